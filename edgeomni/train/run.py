"""The directory of a run: what lies where, when one may be begun, and from where one goes on.

    RUN/config.toml      everything resolved      RUN/checkpoint/    the trained model, ready to export
    RUN/log.jsonl        one line per logged step RUN/adapter/       LoRA in peft's own format
    RUN/curves.png       the same drawn           RUN/ctc.safetensors the CTC head, where one was trained
    RUN/states/          saved states to resume   RUN/evaluation.json text ability before and after

It grows while a run goes on, so that it is no output that appears whole; each file in it does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrainError, UsageError
from ..outputs import named, write_file
from .config import TrainConfig
from .config_file import differences, read_config, to_toml
from .states import last_whole_state

_MAY_CHANGE = ("optimizer.steps", "optimizer.lr", "run.", "data.workers", "data.max_bad")
"""Keys that may be other when a run is resumed: how long, how fast, and how it is watched; not what it computes on."""


@dataclass(frozen=True)
class RunFolder:
    """Paths within a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def states(self) -> Path:
        return self.path / "states"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def ctc(self) -> Path:
        return self.path / "ctc.safetensors"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def data(self) -> Path:
        """What the run's samples were, so that it is not resumed on others."""
        return self.path / "data.json"


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a run."""
    folder = RunFolder(path)
    return folder.config.is_file() and (folder.states.is_dir() or folder.checkpoint.is_dir())


def begin(path: str | Path, config: TrainConfig) -> RunFolder:
    """A new run's directory. Raises UsageError where something is there already, OSError where it cannot be written."""
    folder = RunFolder(named(path))
    if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise UsageError(f"{folder.path} exists; choose another folder, or go on with it: --resume")
    with discarded_if_empty(folder):
        folder.states.mkdir(parents=True, exist_ok=True)
        write_file(folder.config, to_toml(config).encode())
    return folder


def stored_config(path: str | Path, changes: Iterable[str] = ()) -> TrainConfig:
    """What RUN/config.toml says, its paths as they were given, with `changes` on top (config_file.set_key).

    Raises UsageError for what is no run.
    """
    folder = RunFolder(named(path))
    if not folder.config.is_file():
        raise UsageError(f"{folder.path} is no run (it has no config.toml); begin one without --resume")
    return read_config(folder.config, changes, anchored=False)


def resume(path: str | Path, config: TrainConfig) -> RunFolder:
    """The directory of a run that goes on with `config`. Raises UsageError where it computed on something else."""
    folder, stored = RunFolder(named(path)), stored_config(path)
    changed = {k: v for k, v in differences(stored, config).items() if not k.startswith(_MAY_CHANGE)}
    if changed:
        lines = [f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items()]
        raise UsageError(f"{folder.path} cannot be resumed with another configuration: {'; '.join(lines)}")
    write_file(folder.config, to_toml(config).encode(), force=True)
    return folder


def check_same_data(folder: RunFolder, found: dict[str, Any], resuming: bool) -> None:
    """Notes what the samples are when a run begins; raises TrainError where they are others when it goes on."""
    if not resuming or not folder.data.is_file():
        write_file(folder.data, (json.dumps(found) + "\n").encode(), force=True)
        return
    if (before := json.loads(folder.data.read_text(encoding="utf-8"))) != found:
        raise TrainError(
            f"the data has changed since the run began ({before['samples']} samples then, {found['samples']} now, "
            "or other ones); put it back, or begin a new run"
        )


@contextmanager
def discarded_if_empty(folder: RunFolder) -> Iterator[None]:
    """Where a new run fails before its first saved state, nothing of its folder is left: there is nothing to resume."""
    try:
        yield
    except BaseException:
        if last_whole_state(folder.states) is None:
            for path in (folder.config, folder.log, folder.data):
                path.unlink(missing_ok=True)
            for path in (folder.states, folder.tensorboard):
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # something else lies in it by now
                folder.path.rmdir()
        raise
