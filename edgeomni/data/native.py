"""EdgeOmni's own data format: JSON Lines, one sample to a line (docs/data.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError
from ..outputs import new_file
from ..schema import Source, typed
from ..spec import Task
from .clips import clip_of, clips_of, spelled
from .codes import codes_of
from .records import Items, Record, each, json_records
from .sample import Sample

KEYS_OF_CONTENT = frozenset({"audio", "text", "answer", "answer_audio", "answer_codes"})
"""A file whose records have one of these may be in this format."""


@dataclass
class Line:
    """The keys of a line. Null is the same as leaving a key out."""

    task: Task | None = None
    audio: str | list[str] | None = None
    text: str | None = None
    answer: str | None = None
    answer_audio: str | None = None
    answer_codes: Any = None
    system: str | None = None
    language: str | None = None
    speaker: str | None = None
    history: list[tuple[str, str]] | None = None


_KEYS = {field.name for field in fields(Line)}


def read_native(path: Path) -> Items:
    """Samples of a JSON Lines file in EdgeOmni's own format. Unknown keys are faults that name the key."""
    return each(json_records(path), sample_of)


def sample_of(record: Record) -> Iterator[Sample]:
    """The sample of one line. Raises DataError for unknown keys and values that cannot be used."""
    line = _typed(record)
    place, folder = record.place, record.folder
    yield Sample(
        where=record.where,
        task=line.task,
        audio=clips_of(line.audio, place, "audio", folder),
        text=line.text or "",
        answer=line.answer or "",
        answer_audio=None
        if line.answer_audio is None
        else clip_of(line.answer_audio, place, ("answer_audio",), folder),
        answer_codes=None if line.answer_codes is None else codes_of(line.answer_codes),
        system=line.system,
        language=line.language or "",
        speaker=line.speaker or "",
        history=tuple(line.history or ()),
    )


def _typed(record: Record) -> Line:
    """The line with its types. `schema.typed` says which key is at fault, but takes too long for millions of lines."""
    if record.data.keys() <= _KEYS:
        with suppress(msgspec.ValidationError):
            return msgspec.convert(record.data, Line, strict=True)
    return typed(record.data, Line, Source(record.where, DataError, "correct the line"))


def write_jsonl(samples: Iterable[Sample], path: str | os.PathLike[str], force: bool = False) -> None:
    """Writes samples in EdgeOmni's own format; `read_data` gives them back equal.

    Sound files below the folder of `path` are named relative to it, others by their absolute path; sound that is no
    file is written as base64. The log-mel of prepared data (`mel`) is left out. Raises DataError for a sample that
    has nothing but that, AudioError where sound to be written cannot be had, UsageError and OSError as
    `outputs.new_file` does.
    """
    folder = Path(os.path.abspath(path)).parent
    with new_file(path, force) as part, part.open("wb") as f:
        for sample in samples:
            f.write(msgspec.json.encode(_line(sample, folder)) + b"\n")


def _line(sample: Sample, folder: Path) -> dict[str, Any]:
    if sample.mel is not None and not sample.audio:
        raise DataError(f"{sample.where}: has a log-mel and no recording, so JSON Lines cannot hold it")
    clips = [spelled(clip, folder) for clip in sample.audio]
    codes = sample.answer_codes
    whole = {
        "task": sample.task,
        "audio": clips[0] if len(clips) == 1 else clips,
        "text": sample.text,
        "answer": sample.answer,
        "answer_audio": sample.answer_audio and spelled(sample.answer_audio, folder),
        "answer_codes": None if codes is None else codes.tolist(),
        "language": sample.language,
        "speaker": sample.speaker,
        "history": sample.history,
    }
    line = {key: value for key, value in whole.items() if value}
    return line if sample.system is None else {**line, "system": sample.system}
