"""Turns of a conversation, as chat formats hold them -> samples. One sample for each answer, as such trainers learn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import DataError
from .sample import Clip, Sample

AUDIO_TAG = re.compile(r"<audio(?:_\d+)?>")
"""What stands in a question for a recording: <audio>, or <audio_00> where MiniCPM names several."""


@dataclass(frozen=True)
class Turn:
    """`question`: its text, without tags. `clips`: the recordings in it."""

    question: str
    answer: str
    clips: tuple[Clip, ...] = ()


def samples_of(where: str, turns: list[Turn], system: str | None = None) -> Iterator[Sample]:
    """A sample for each turn, with the turns before it as its history.

    What is written beside a recording is no transcript but what is asked about it. The prompt of a spoken question
    has no other place for it, so it joins the system prompt. Raises DataError for a turn after a spoken one, since
    history is text.
    """
    for i, turn in enumerate(turns):
        if any(earlier.clips for earlier in turns[:i]):
            raise DataError(f"turn {i + 1} follows a spoken one, and earlier turns can only be text; split it")
        yield Sample(
            where=where if len(turns) == 1 else f"{where} turn {i + 1}",
            task="at" if turn.clips else "tt",
            audio=turn.clips,
            text="" if turn.clips else turn.question,
            answer=turn.answer,
            system=joined(system, turn.question) if turn.clips else system or None,
            history=tuple((earlier.question, earlier.answer) for earlier in turns[:i]),
        )


def joined(*texts: str | None) -> str | None:
    """The texts that are not blank, one below the other; None where all are."""
    return "\n".join(text.strip() for text in texts if text and text.strip()) or None


def without_tags(text: str) -> str:
    """The words of a question, without what stands for recordings."""
    return re.sub(" {2,}", " ", AUDIO_TAG.sub("", text)).strip()


def text_at(data: dict[str, object], key: str | None) -> str:
    """The text at a key; "" where there is none, or null. Raises DataError for what is no text."""
    value = data.get(key) if key else None
    if value is not None and not isinstance(value, str):
        raise DataError(f"{key} must be a text")
    return value or ""


def refuse_pictures(data: dict[str, object]) -> None:
    """Raises DataError for a record about pictures or films."""
    for key in ("image", "images", "video", "videos"):
        if data.get(key):
            raise DataError(f"has {key}, and EdgeOmni's models see no pictures; leave the record out")
