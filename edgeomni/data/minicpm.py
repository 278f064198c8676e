"""MiniCPM-V and MiniCPM-o's fine-tuning JSON.

Follows finetune/readme.md of OpenBMB/MiniCPM-V (a list of `{"id", "image", "conversations"}`, turns as role and
content, several images as an object of `<image_00>`, ... and a tag in the text, or none, which means the front), with
`audio` in the place of `image`; and the short form `{"audio": base64, "text": ...}` of the discussion of its issue 745,
with one or several audios.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .clips import clip_of, clips_of
from .conversations import AUDIO_TAG, Turn, joined, refuse_pictures, samples_of, text_at, without_tags
from .records import Items, Record, each, json_records
from .sample import Clip, Sample


def read_minicpm(path: Path) -> Items:
    """Samples of a MiniCPM fine-tuning file. Keys beside those documented (`id`) are left alone."""
    return each(json_records(path), _samples)


def is_minicpm(data: dict[str, Any]) -> bool:
    """Whether a record has recordings under `audio`, and turns as role and content."""
    turns = data.get("conversations")
    return "audio" in data and isinstance(turns, list) and any(isinstance(t, dict) and "role" in t for t in turns)


def _samples(record: Record) -> Iterator[Sample]:
    data = record.data
    refuse_pictures(data)
    clips = _clips(record)
    if "conversations" not in data:
        if not clips:
            raise DataError("needs audio, and text or conversations")
        yield Sample(record.where, audio=tuple(clips.values()), text=text_at(data, "text"))
        return
    turns, system = _turns(data["conversations"])
    yield from samples_of(record.where, _spoken(turns, clips), joined(text_at(data, "system"), system))


def _clips(record: Record) -> dict[str, Clip]:
    """Clips by the tags that stand for them, in order; where the text names none, the keys are only numbers."""
    value = record.data.get("audio")
    if isinstance(value, dict):
        return {key: clip_of(one, record.place, ("audio", key), record.folder) for key, one in value.items()}
    return {str(i): clip for i, clip in enumerate(clips_of(value, record.place, "audio", record.folder))}


def _turns(messages: object) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) of each turn, and the system prompt."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise DataError("conversations must be a list of objects with role and content")
    said = [(one.get("role"), text_at(one, "content")) for one in messages]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    if not said or [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise DataError("conversations must be of user and assistant by turns, user first and assistant last")
    texts = [text for _, text in said]
    return list(zip(texts[::2], texts[1::2], strict=True)), system


def _spoken(turns: list[tuple[str, str]], clips: dict[str, Clip]) -> list[Turn]:
    """Turns with their recordings: where their tags stand, or all in the first one where no tag does."""
    if not any(AUDIO_TAG.search(question) for question, _ in turns):
        (question, answer), *rest = turns
        return [Turn(question.strip(), answer, tuple(clips.values())), *(Turn(q.strip(), a) for q, a in rest)]
    left, out = dict(clips), []
    for question, answer in turns:
        tags = AUDIO_TAG.findall(question)
        found = [left.pop(tag if tag in left else next(iter(left), ""), None) for tag in tags]
        if None in found:
            raise DataError(f"has more tags for recordings than recordings ({len(clips)})")
        out.append(Turn(without_tags(question), answer, tuple(clip for clip in found if clip)))
    if left:
        raise DataError(f"has {len(left)} recording(s) that no tag stands for; write <audio> where each belongs")
    return out
