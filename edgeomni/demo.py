"""The demo: a tiny model with random weights goes the whole way, from checkpoint to spoken answer and profile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import Bundle
from .errors import UsageError
from .export import export_bundle
from .printing import say, show
from .profiling import report
from .profiling.measure import Job, measure_apart
from .profiling.question import spoken_question
from .sampling import Sampling
from .session import AudioChunk, Session, TextDelta, TurnEnd
from .sound_writer import SoundWriter

if TYPE_CHECKING:
    from rich.console import Console

PRECISIONS = ("int4", "int8")
QUESTION_S = 3.0
CODEC_FRAMES = 60
"""Forced on the profiled answers: about five seconds of SNAC 24 kHz."""


def demo(console: Console, *, keep: str | None = None, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Builds, exports, asks and profiles; returns the report of each precision. `keep`: a new folder that stays.

    Raises UsageError where `keep` exists.
    """
    with _folder(keep) as root:
        from .model import checkpoints

        console.rule(
            f"a tiny model, weights random (seed {seed}): its answers are noise, the machinery is the real one"
        )
        model = checkpoints.preset("tiny", seed)
        question = _question(root, model.spec.front_end.sample_rate)
        console.print(f"question: {QUESTION_S:g} s of synthesized vowels, no recording")
        bundles = {p: export_bundle(model, root / f"bundle-{p}", precision=p) for p in PRECISIONS}
        for precision, bundle in bundles.items():
            console.print(f"\n{precision}: {bundle.size / 1e6:.2f} MB, gate passed")
            _answer(console, bundle, question, root / f"answer-{precision}.wav")
        reports = {p: _profile(console, bundle, question) for p, bundle in bundles.items()}
        if keep:
            console.print(f"kept in {root}: question, bundles, answers")
    return reports


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="edgeomni-demo-") as scratch:
            yield Path(scratch)
        return
    root = Path(keep)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        root.mkdir()
    except FileExistsError as exc:
        raise UsageError(f"{root} exists; give --keep the name of a new folder") from exc
    yield root


def _question(root: Path, rate: int) -> Path:
    path = root / "question.wav"
    with SoundWriter(path, rate) as out:
        out.write(spoken_question(QUESTION_S, rate))
    return path


def _answer(console: Console, bundle: Bundle, question: Path, target: Path) -> None:
    """One spoken answer, text to the console as it comes, audio to `target`."""
    session = Session.open(bundle)
    with SoundWriter(target, session.spec.codec.sample_rate) as out:
        for event in session.respond("aa", question, sampling=Sampling(greedy=True), max_length=_length(session)):
            if isinstance(event, TextDelta):
                console.print(event.text, end="", style="cyan")
            elif isinstance(event, AudioChunk):
                out.write(event.samples)
            else:
                console.print(f"\n{_summary(event)}")


def _length(session: Session) -> int:
    """Room for the prompt and about as many frames as the profile's answer has."""
    return min(session.spec.context, int(QUESTION_S * 50) + 4 + CODEC_FRAMES + session.spec.layout.streams)


def _summary(end: TurnEnd) -> str:
    times = end.timings
    audio = f"{times['audio']:.2f} s of audio, first after {times['ttfa']:.3f} s" if "ttfa" in times else "no audio"
    return f"answered ({end.reason}): {end.tokens.shape[1]} frames, {audio}"


def _profile(console: Console, bundle: Bundle, question: Path) -> dict[str, Any]:
    result = measure_apart(Job(str(bundle.path), audio=str(question), turns=2, forced_frames=CODEC_FRAMES))
    for part in report.tables(result):
        say(console, part) if isinstance(part, str) else show(console, part)
    return result
