"""Hugging Face datasets on disk: folders of `save_to_disk`, Parquet and Arrow files. Needs the `datasets` package.

Columns follow the dataset cards: gpt-omni/VoiceAssistant-400K (question, question_audio, answer, answer_snac; also the
re-synthesized worstchan/*-SLAM-Omni, whose CosyVoice tokens are left alone), PKU-Alignment/align-anything
(text-audio-to-text: prompt, audio_path, response_1, response_2, overall_response; and prompt with response), and
recordings with transcripts or answers under the names of EdgeOmni's own format.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AudioError, DataError
from ..install_hint import install_command
from ..schema import short
from ..spec import TASKS
from .codes import codes_of, codes_of_text
from .conversations import joined, text_at
from .records import Items, fault_of
from .sample import Clip, Sample
from .slam_omni import rounds

_SHARD = re.compile(r"(.*)-\d+-of-\d+")


@dataclass(frozen=True)
class Sound:
    """The bytes of one recording of a table, read when they are wanted."""

    table: Any
    column: str
    row: int
    name: str
    folder: Path

    def __call__(self) -> bytes:
        """Raises AudioError where the table names a file that cannot be read."""
        value: dict[str, Any] = self.table[self.row][self.column]
        if value["bytes"]:
            return bytes(value["bytes"])
        try:
            return Path(self.folder, value["path"]).read_bytes()
        except (OSError, ValueError) as exc:
            raise AudioError(f"{self.name}: {value['path']} cannot be read ({exc})") from exc


@dataclass(frozen=True)
class Row:
    """One row: its texts and numbers in `data`, its recordings in `clips`."""

    where: str
    data: dict[str, Any]
    clips: dict[str, Clip]

    def text(self, column: str) -> str:
        return text_at(self.data, column)

    def audio(self, column: str) -> tuple[Clip, ...]:
        return (self.clips[column],) if column in self.clips else ()


@dataclass(frozen=True)
class Layout:
    """A known set of columns: what makes a sample of a row, which columns that takes, and which tell the layout."""

    sample: Callable[[Row], Sample]
    needs: frozenset[str]
    values: tuple[str, ...]
    sounds: tuple[str, ...] = ()


def is_huggingface(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".parquet", ".arrow")
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    return path.is_dir() and (saved or bool(_parquets(path)))


def read_huggingface(path: Path) -> Items:
    """Samples of a dataset on disk. Sound stays on disk, undecoded, until it is asked for.

    Parquet is converted once into the cache of `datasets` (HF_DATASETS_CACHE), Arrow is read in place. Raises
    DataError where `datasets` is not installed, the dataset cannot be read or has several splits, or its columns are
    none that are known.
    """
    table = _opened(path)
    layout = _layout(path, set(table.column_names))
    here = set(table.column_names)
    sounds = {name: _column(table, path, name) for name in layout.sounds if name in here}
    for i, data in enumerate(table.select_columns([name for name in layout.values if name in here])):
        where = f"{path}[{i}]"
        clips = {
            name: Clip(
                Sound(column, name, i, f"{where}: {name}", path if path.is_dir() else path.parent), f"{where}: {name}"
            )
            for name, (column, present) in sounds.items()
            if present[i]
        }
        try:
            yield layout.sample(Row(where, data, clips))
        except DataError as exc:
            yield fault_of(where, exc)


def _voice_assistant(row: Row) -> Sample:
    history, text = rounds(row.text("question"))
    snac = row.text("answer_snac")
    return Sample(
        row.where,
        None,
        row.audio("question_audio"),
        text,
        row.text("answer"),
        answer_codes=codes_of_text(snac) if snac.strip() else None,
        history=history,
    )


def _text_audio_to_text(row: Row) -> Sample:
    """The better of two answers; what the prompt asks about the recording joins the system prompt."""
    better = row.data["overall_response"]
    if str(better) not in ("1", "2"):
        raise DataError(f"overall_response is {better}; it must say whether response_1 or response_2 is better")
    answer = row.text(f"response_{better}")
    return Sample(row.where, "at", row.audio("audio_path"), answer=answer, system=joined(row.text("prompt")))


def _prompt_response(row: Row) -> Sample:
    return Sample(row.where, "tt", text=row.text("prompt"), answer=row.text("response"))


def _own(row: Row) -> Sample:
    codes, task = row.data.get("answer_codes"), row.data.get("task")
    if task is not None and task not in TASKS:
        raise DataError(f"task is {short(task)}; it must be one of {', '.join(TASKS)}")
    return Sample(
        row.where,
        task,
        row.audio("audio"),
        row.text("text"),
        row.text("answer"),
        next(iter(row.audio("answer_audio")), None),
        None if codes is None else codes_of(codes),
        row.text("system") or None,
        row.text("language"),
        row.text("speaker"),
    )


_OWN_VALUES = ("task", "text", "answer", "answer_codes", "system", "language", "speaker")
_PREFERENCE = ("prompt", "response_1", "response_2", "overall_response")
LAYOUTS = {
    "VoiceAssistant-400K": Layout(
        _voice_assistant,
        frozenset({"question", "answer", "question_audio"}),
        ("question", "answer", "answer_snac"),
        ("question_audio",),
    ),
    "align-anything, text-audio-to-text": Layout(
        _text_audio_to_text, frozenset({*_PREFERENCE, "audio_path"}), _PREFERENCE, ("audio_path",)
    ),
    "align-anything, text-to-text": Layout(_prompt_response, frozenset({"prompt", "response"}), ("prompt", "response")),
    "recordings and transcripts": Layout(_own, frozenset({"audio", "text"}), _OWN_VALUES, ("audio", "answer_audio")),
    "recordings and answers": Layout(_own, frozenset({"audio", "answer"}), _OWN_VALUES, ("audio", "answer_audio")),
}
"""Layouts by what messages call them; the first whose columns are all there is taken."""


def _layout(path: Path, columns: set[str]) -> Layout:
    for layout in LAYOUTS.values():
        if layout.needs <= columns:
            return layout
    known = "; ".join(f"{name} ({', '.join(sorted(layout.needs))})" for name, layout in LAYOUTS.items())
    raise DataError(
        f"{path}: has the columns {', '.join(sorted(columns))}, which are none that are known: {known}; rename them "
        "(datasets.Dataset.rename_columns), or write EdgeOmni's own format"
    )


def _opened(path: Path) -> Any:
    """The dataset, its recordings undecoded. Raises DataError for what `datasets` cannot open."""
    try:
        import datasets
    except ImportError as exc:
        raise DataError(f"{path}: reading it needs the datasets package: {install_command('train')}") from exc
    if (path / "dataset_dict.json").is_file():
        splits = sorted(one.parent.name for one in path.glob("*/state.json"))
        raise DataError(f"{path}: has the splits {', '.join(splits)}; name one of them: {path / 'SPLIT'}")
    try:
        if path.suffix == ".arrow":
            table = datasets.Dataset.from_file(str(path))
        elif (path / "state.json").is_file():
            table = datasets.load_from_disk(str(path))
        else:
            files = [path] if path.is_file() else _of_one_split(path)
            table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Audio):
                table = table.cast_column(name, datasets.Audio(decode=False))
    except DataError:
        raise
    except Exception as exc:  # datasets, pyarrow and fsspec have dozens of their own kinds
        raise DataError(f"{path}: cannot be read as a dataset ({type(exc).__name__}: {exc})") from exc
    return table


def _parquets(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])


def _of_one_split(folder: Path) -> list[Path]:
    """The Parquet files of a folder. Raises DataError where their names tell of several splits."""
    files = _parquets(folder)
    splits = sorted({found[1] if (found := _SHARD.fullmatch(file.stem)) else file.stem for file in files})
    if len(splits) > 1:
        raise DataError(f"{folder}: has Parquet files of several splits ({', '.join(splits)}); give the files of one")
    return files


def _column(table: Any, path: Path, name: str) -> tuple[Any, list[bool]]:
    """The column alone, and of each row whether it has a recording; the recordings themselves are not read."""
    import pyarrow.compute as pc

    stored = table.data.column(name)
    try:
        has = pc.or_(*(pc.struct_field(stored, part).is_valid() for part in ("bytes", "path")))
    except Exception as exc:  # pyarrow's own kinds
        raise DataError(f"{path}: column {name} holds no recordings (bytes and path), but {stored.type}") from exc
    return table.select_columns([name]), pc.and_(has, stored.is_valid()).to_pylist()
