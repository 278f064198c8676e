"""How an answer's end is told: the reason as a sentence, one line of figures, the stages, one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..session import TurnEnd
from ..spec import OmniSpec, Task
from ..turn import audio_frames

_ENDED = {"eoa": "the model ended its answer", "eot": "the model ended its answer", "cancelled": "cancelled"}


@dataclass(frozen=True)
class Limits:
    """What bounded the answer: `max_length` LLM frames with the prompt, `max_seconds` of sound (None: no limit)."""

    max_length: int | None
    max_seconds: float | None


def reason(end: TurnEnd, task: Task, spec: OmniSpec, limits: Limits) -> str:
    """Why the answer ended, as a sentence without its full stop."""
    if end.reason in _ENDED:
        return _ENDED[end.reason]
    frames = end.tokens.shape[-1]
    return f"the answer stopped at the length limit of {frames} frames ({_limit(frames, task, spec, limits)})"


def _limit(frames: int, task: Task, spec: OmniSpec, limits: Limits) -> str:
    """Which limit it was, and how to have more."""
    most = audio_frames(task, limits.max_seconds, spec)
    if most is not None and frames == most + spec.layout.streams:
        return f"{limits.max_seconds:g} s of sound; --max-seconds allows more"
    if limits.max_length is not None and limits.max_length < spec.context:
        return f"--max-length {limits.max_length} counts the prompt in"
    return f"with the prompt they fill the checkpoint's context of {spec.context}"


def summary(end: TurnEnd, why: str) -> str:
    """One line: why it ended, how much came, how fast."""
    times = end.timings
    parts = [why, f"{end.tokens.shape[-1]} frames in {times['total']:.2f} s"]
    if audio := times.get("audio"):
        parts.append(f"{audio:.2f} s of audio, first after {times['ttfa']:.2f} s, RTF {times['rtf']:.3f}")
    if end.silent_frames:
        parts.append(f"{end.silent_frames} silent frames")
    return "; ".join(parts)


def stages(end: TurnEnd) -> Iterator[str]:
    """One line per stage: how often it ran and how long it took in all."""
    for name, seconds in end.spans.records.items():
        times = f"{len(seconds)} times, " if len(seconds) > 1 else ""
        yield f"stage {name}: {times}{sum(seconds):.3f} s"


def as_json(end: TurnEnd, why: str, task: Task, files: dict[str, str]) -> str:
    """The answer as one JSON object. `files`: what was written ("audio", "tokens") -> its path."""
    data: dict[str, Any] = {
        "task": task,
        "text": end.text,
        "reason": {"code": end.reason, "sentence": why},
        "frames": int(end.tokens.shape[-1]),
        "silent_frames": end.silent_frames,
        "timings": end.timings,
        "stages": {name: {"count": len(s), "seconds": sum(s)} for name, s in end.spans.records.items()},
        "files": files,
    }
    return json.dumps(data, ensure_ascii=False, sort_keys=True)
