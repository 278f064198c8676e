"""LLaMA-Factory's data: sharegpt with `audios` and <audio> tags, alpaca, and `dataset_info.json` that describes them.

Follows data/README.md of hiyouga/LLaMA-Factory: the description's columns, tags and formatting, with its defaults. As
there, a description that has `columns` has no others, paths of recordings start from the folder of dataset_info.json,
and there are as many <audio> tags as recordings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..outputs import first_few
from ..schema import Source, parse_json, read_bytes, short
from .clips import clips_of
from .conversations import AUDIO_TAG, Turn, joined, refuse_pictures, samples_of, text_at, without_tags
from .records import Fault, Items, Record, each, json_records
from .sample import Clip, Sample

INFO = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_OPTIONAL = {"system": "system", "history": "history", "audios": "audios"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
_OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@dataclass(frozen=True)
class Layout:
    """How a dataset is laid out: names of columns and tags by LLaMA-Factory's names for them."""

    sharegpt: bool
    columns: dict[str, str] = field(default_factory=lambda: {**_ALPACA, **_OPTIONAL, "messages": "conversations"})
    tags: dict[str, str] = field(default_factory=lambda: dict(_TAGS))
    folder: Path | None = None


def read_llama_factory(path: Path) -> Items:
    """Samples of a LLaMA-Factory dataset.

    `path`: a data file (with the description of a dataset_info.json beside it, or by its own keys), a folder with a
    dataset_info.json or that file itself (every dataset in it that is a file), or FOLDER/NAME for one dataset of it.
    """
    folder = path if path.is_dir() else path.parent
    info = _info(folder) if (folder / INFO).is_file() else {}
    if path.is_dir() or path.name == INFO:
        yield from _all(folder, info)
    elif path.is_file():
        described = _described(info, path)
        yield from _file(path, _layout(path.name, described[0], folder) if described else None)
    elif isinstance(description := info.get(path.name), dict):
        yield from _dataset(folder, path.name, description)
    else:
        raise DataError(f"{folder / INFO}: has no dataset {path.name}; it has {first_few(sorted(info))}")


def is_described(path: Path) -> bool:
    """Whether a dataset_info.json lies in the folder `path`, is that file, or describes that file or dataset."""
    if path.is_dir() or path.name == INFO:
        return (path / INFO).is_file() or path.is_file()
    info = path.parent / INFO
    return info.is_file() and (not path.exists() or bool(_described(_info(path.parent), path)))


def is_llama_factory(data: dict[str, Any]) -> bool:
    """Whether a record has the keys of a sharegpt or alpaca dataset."""
    return isinstance(data.get("conversations", data.get("messages")), list) or {"instruction", "output"} <= set(data)


def _info(folder: Path) -> dict[str, Any]:
    source = Source(str(folder / INFO), DataError, "see data/README.md of LLaMA-Factory")
    return parse_json(read_bytes(folder / INFO, source), source)


def _described(info: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    return [one for one in info.values() if isinstance(one, dict) and one.get("file_name") == path.name]


def _all(folder: Path, info: dict[str, Any]) -> Items:
    here = {name: one for name, one in info.items() if isinstance(one, dict) and "file_name" in one}
    for name, description in here.items():
        yield from _dataset(folder, name, description)
    if elsewhere := sorted(set(info) - set(here)):
        named = first_few(elsewhere)
        yield Fault(str(folder / INFO), f"{len(elsewhere)} dataset(s) have no file_name ({named}); download them first")


def _dataset(folder: Path, name: str, description: dict[str, Any]) -> Items:
    layout = _layout(name, description, folder)
    file = description.get("file_name")
    if not isinstance(file, str) or not file or "\0" in file or not (folder / file).is_file():
        yield Fault(f"{folder / INFO}: {name}", f"file_name holds {short(file)}, and there is no such file")
        return
    yield from _file(folder / file, layout)


def _layout(name: str, description: dict[str, Any], folder: Path) -> Layout:
    """The layout that a description states. Raises DataError for one that cannot be read."""
    formatting, columns, tags = (description.get(key) for key in ("formatting", "columns", "tags"))
    where = f"{folder / INFO}: {name}"
    if formatting not in (None, "alpaca", "sharegpt"):
        raise DataError(f"{where}: formatting is {short(formatting)}; alpaca and sharegpt are understood")
    if description.get("ranking") or (isinstance(columns, dict) and columns.get("kto_tag")):
        raise DataError(f"{where}: holds preferences between answers, and EdgeOmni learns answers; leave it out")
    for key, value in (("columns", columns or {}), ("tags", tags or {})):
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise DataError(f"{where}: {key} must be an object of texts")
    layout = Layout(formatting == "sharegpt", folder=folder)
    if columns:
        layout = replace(layout, columns={"messages": "conversations", **columns})
    return replace(layout, tags={**_TAGS, **(tags or {})})


def _file(path: Path, layout: Layout | None) -> Items:
    return each(json_records(path), partial(_samples, layout))


def _samples(layout: Layout | None, record: Record) -> Iterator[Sample]:
    refuse_pictures(record.data)
    layout = layout or _guessed(record.data)
    audios = clips_of(
        record.data.get(layout.columns.get("audios", "")),
        record.place,
        layout.columns.get("audios", ""),
        layout.folder or record.folder,
    )
    system = text_at(record.data, layout.columns.get("system"))
    if layout.sharegpt:
        texts, own = _messages(record.data, layout)
        system = own or system
    else:
        texts = _alpaca(record.data, layout.columns)
    yield from samples_of(record.where, _with_audios(texts, list(audios)), system)


def _guessed(data: dict[str, Any]) -> Layout:
    """The layout of a file that no description names: alpaca, sharegpt, or sharegpt with OpenAI's names."""
    column = "messages" if "messages" in data else "conversations"
    messages = data.get(column)
    layout = Layout(sharegpt=messages is not None, columns={**_ALPACA, **_OPTIONAL, "messages": column})
    openai = isinstance(messages, list) and messages and isinstance(messages[0], dict) and "role" in messages[0]
    return replace(layout, tags={**_TAGS, **_OPENAI}) if openai else layout


def _messages(data: dict[str, Any], layout: Layout) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) of each turn, and the system prompt that stands as the first message, "" without one."""
    messages, tags = data.get(layout.columns["messages"]), layout.tags
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise DataError(f"{layout.columns['messages']} must be a list of objects")
    said = [(one.get(tags["role_tag"]), text_at(one, tags["content_tag"])) for one in messages]
    system = said.pop(0)[1] if said and said[0][0] == tags["system_tag"] else ""
    roles = [tags["user_tag"], tags["assistant_tag"]]
    if not said or [role for role, _ in said] != roles * (len(said) // 2):
        raise DataError(
            f"messages must be of {roles[0]} and {roles[1]} by turns, the latter last; tools are not learned"
        )
    texts = [text for _, text in said]
    return list(zip(texts[::2], texts[1::2], strict=True)), system


def _alpaca(data: dict[str, Any], columns: dict[str, str]) -> list[tuple[str, str]]:
    question = joined(text_at(data, columns.get("prompt")), text_at(data, columns.get("query"))) or ""
    history = data.get(columns.get("history", "")) or []
    pairs = isinstance(history, list) and all(isinstance(one, list) and len(one) == 2 for one in history)
    if not pairs or not all(isinstance(text, str) for one in history for text in one):
        raise DataError("history must be a list of pairs, question and answer")
    return [*((q, a) for q, a in history), (question, text_at(data, columns.get("response")))]


def _with_audios(texts: list[tuple[str, str]], audios: list[Clip]) -> list[Turn]:
    counts = [len(AUDIO_TAG.findall(question)) for question, _ in texts]
    if sum(counts) != len(audios):
        raise DataError(f"has {sum(counts)} <audio> tag(s) and {len(audios)} recording(s); there must be one for each")
    turns = []
    for (question, answer), count in zip(texts, counts, strict=True):
        turns.append(Turn(without_tags(question), answer, tuple(audios[:count])))
        del audios[:count]
    return turns
