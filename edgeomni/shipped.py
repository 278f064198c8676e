"""The models that EdgeOmni brings, by name: each a checkpoint, a bundle and a spoken sample question in a folder here.

    edgeomni/nano/checkpoint/   float16, for torch       edgeomni/nano/question.wav   the sample question
    edgeomni/nano/bundle/       INT4, needs no torch     edgeomni/nano/question.txt   its words

Wherever a bundle or a checkpoint is opened, the name alone is enough. A local file or folder of the same name wins.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import AudioError, BundleError, CheckpointError, EdgeOmniError

What = Literal["bundle", "checkpoint"]

NAMES = ("nano",)
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class SampleQuestion:
    """`path`: a sound file. `text`: what is asked in it."""

    path: Path
    text: str


def is_shipped(source: str | os.PathLike[str], folder: str | os.PathLike[str] = "") -> bool:
    """Whether `source` names a shipped model, and nothing in `folder` ("": the working directory) has that name."""
    name = os.fspath(source)
    return name in NAMES and not os.path.lexists(os.path.join(folder, name))


def found(source: str | os.PathLike[str], what: What, folder: str | os.PathLike[str] = "") -> str | os.PathLike[str]:
    """The path of a shipped model's bundle or checkpoint where `source` is its name; else `source` as it is.

    `folder`: where a file or folder of the same name wins, the working directory by default. Raises BundleError or
    CheckpointError where this copy of EdgeOmni was made without the model.
    """
    if not is_shipped(source, folder):
        return source
    return _present(os.fspath(source), what, BundleError if what == "bundle" else CheckpointError)


def to_run(source: str | os.PathLike[str], engine: str | None) -> str | os.PathLike[str]:
    """The same for what `engine` (None: the one that fits) runs: torch runs the checkpoint, all others the bundle."""
    return found(source, "checkpoint" if engine == "torch" else "bundle")


def sample_question(source: str | os.PathLike[str], folder: str | os.PathLike[str] = "") -> SampleQuestion | None:
    """The spoken question that a shipped model brings; None where `source` is none. `folder` as in `found`.

    Raises AudioError where this copy of EdgeOmni was made without it.
    """
    if not is_shipped(source, folder):
        return None
    sound, words = (_present(os.fspath(source), name, AudioError) for name in ("question.wav", "question.txt"))
    return SampleQuestion(sound, words.read_text(encoding="utf-8").strip())


def _present(name: str, part: str, error: type[EdgeOmniError]) -> Path:
    path = _PACKAGE / name / part
    if not path.exists():
        raise error(
            f"{name} is a model that EdgeOmni brings, but this copy has no {path}; install EdgeOmni from its wheel or "
            "from a whole checkout, or give the path of a bundle or checkpoint of your own"
        )
    return path
