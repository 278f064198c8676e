"""SLAM-Omni's JSON Lines: `key`, `source_wav`, `source_text`, `target_wav`, `target_text`.

Follows examples/s2s/README.md of X-LANCE/SLAM-LLM. Conversations of several rounds stand in the question's text, as
"<USER>: ... <ASSISTANT>: ... <USER>: ..."; the last question is the spoken one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .clips import clip_of, clips_of
from .conversations import text_at
from .records import Items, Record, each, json_records
from .sample import Sample

_SPEAKER = re.compile(r"<(USER|ASSISTANT)>:")


def read_slam_omni(path: Path) -> Items:
    """Samples of a SLAM-Omni file. Keys beside those documented are left alone."""
    return each(json_records(path), _sample)


def is_slam_omni(data: dict[str, Any]) -> bool:
    """Whether a record has the keys of a question in SLAM-Omni's form."""
    return "source_text" in data or "source_wav" in data


def _sample(record: Record) -> Iterator[Sample]:
    data, place, folder = record.data, record.place, record.folder
    history, text = rounds(text_at(data, "source_text"))
    target = data.get("target_wav")
    yield Sample(
        where=record.where,
        audio=clips_of(data.get("source_wav"), place, "source_wav", folder),
        text=text,
        answer=text_at(data, "target_text"),
        answer_audio=None if target is None else clip_of(target, place, ("target_wav",), folder),
        history=history,
    )


def rounds(text: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """Earlier turns and the last question of a question's text; a text without speakers is a question alone.

    Raises DataError where the speakers do not take turns.
    """
    before, *parts = _SPEAKER.split(text)
    if not parts:
        return (), text
    said = [part.strip() for part in parts[1::2]]
    if before.strip() or parts[::2] != (["USER", "ASSISTANT"] * len(said))[: len(said)] or len(said) % 2 == 0:
        raise DataError("the question must be <USER>: and <ASSISTANT>: by turns, and end with a question")
    return tuple(zip(said[:-1:2], said[1::2], strict=True)), said[-1]
