"""Data of every known format -> samples. Formats are told by what the files hold; sound is not opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError
from ..outputs import first_few
from .huggingface import is_huggingface, read_huggingface
from .kaldi import NEEDED, read_kaldi
from .llama_factory import INFO, is_described, is_llama_factory, read_llama_factory
from .minicpm import is_minicpm, read_minicpm
from .native import KEYS_OF_CONTENT, read_native
from .records import Fault, Items, Record, fault_of, json_records
from .sample import Sample
from .slam_omni import is_slam_omni, read_slam_omni

Location = str | os.PathLike[str]
MOST_FAULTS = 10
_LOOKED_AT = 20
"""Records at the head of a file that are looked at for its format: some of them may be broken."""
_TOLD = 3
_log = logging.getLogger("edgeomni")


@dataclass(frozen=True)
class Reader:
    """One format. `of_path` tells it by names of files, `of_record` by the keys of a JSON object."""

    what: str
    read: Callable[[Path], Items]
    of_path: Callable[[Path], bool] = lambda path: False
    of_record: Callable[[dict[str, Any]], bool] = lambda data: False


READERS = {
    "kaldi": Reader(
        "a CosyVoice (Kaldi) folder: wav.scp, text, utt2spk",
        read_kaldi,
        of_path=lambda path: all((path / name).is_file() for name in NEEDED),
    ),
    "huggingface": Reader(
        "a Hugging Face dataset on disk: save_to_disk, Parquet, Arrow", read_huggingface, of_path=is_huggingface
    ),
    "minicpm": Reader("MiniCPM fine-tuning JSON: audio, conversations", read_minicpm, of_record=is_minicpm),
    "llama-factory": Reader(
        "LLaMA-Factory: dataset_info.json, sharegpt with audios, alpaca",
        read_llama_factory,
        of_path=is_described,
        of_record=is_llama_factory,
    ),
    "slam-omni": Reader(
        "SLAM-Omni JSON Lines: source_wav, source_text, target_wav, target_text",
        read_slam_omni,
        of_record=is_slam_omni,
    ),
    "native": Reader(
        "EdgeOmni's JSON Lines: audio, text, answer, answer_audio, ...",
        read_native,
        of_record=lambda data: bool(KEYS_OF_CONTENT & set(data)),
    ),
}
"""Every format by its name, in the order in which they are tried."""


@dataclass(frozen=True)
class DataSet:
    """Samples that can be used, and faults of those that cannot. `source` and `format` are what messages call them."""

    samples: list[Sample]
    format: str
    faults: list[Fault]
    source: str


def read_data(
    source: Location | Sequence[Location], format: str | None = None, *, max_bad: int | None = MOST_FAULTS
) -> DataSet:
    """The samples of a file or folder, or of several, in order. docs/data.md describes the formats.

    The format is told by the content; `format` (a name in `READERS`) insists on one. A record that cannot be used is
    a fault, and one warning tells of them all; more than `max_bad` (None: any number) raise DataError that names the
    first few. Sound is not opened: a missing recording shows when it is read. Raises DataError too where there is no
    sample, where the format is unknown, and for a file that cannot be read; UsageError for an unknown `format`.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise UsageError("no data given; name a file or a folder")
    paths = [_existing(one) for one in sources]
    names = [_format(path, format) for path in paths]
    samples, faults = list[Sample](), list[Fault]()
    for path, name in zip(paths, names, strict=True):
        for item in _checked(READERS[name].read(path)):
            if isinstance(item, Sample):
                samples.append(item)
                continue
            faults.append(item)
            if max_bad is not None and len(faults) > max_bad:
                raise DataError(f"more than {max_bad} records cannot be used: {_told(faults)}; correct them first")
    named = ", ".join(str(path) for path in paths)
    if not samples:
        raise DataError(f"{named}: no sample in it can be used{': ' if faults else ''}{_told(faults)}")
    if faults:
        _log.warning("%d record(s) cannot be used and are left out: %s", len(faults), _told(faults))
    return DataSet(samples, ", ".join(dict.fromkeys(names)), faults, named)


def _existing(source: Location) -> Path:
    text = os.fspath(source)
    path = Path(text)
    if "\0" in text or not text:
        raise UsageError(f"{text!r} cannot be the name of data; give a file or a folder")
    if not (path.is_file() or path.is_dir() or (path.parent / INFO).is_file()):
        raise DataError(f"{path}: no such file or folder")
    return path


def _format(path: Path, format: str | None) -> str:
    """The name of the format of what lies at `path`."""
    if format is not None:
        if format not in READERS:
            raise UsageError(f"unknown format {format!r}; known are {', '.join(READERS)}")
        return format
    for name, reader in READERS.items():
        if reader.of_path(path):
            return name
    records = (
        [] if path.is_dir() else [one for one in islice(json_records(path), _LOOKED_AT) if isinstance(one, Record)]
    )
    for record in records:
        for name, reader in READERS.items():
            if reader.of_record(record.data):
                return name
    seen = f"has the keys {first_few(sorted(records[0].data))}" if records else "holds no JSON objects"
    known = "".join(f"\n  {name}: {reader.what}" for name, reader in READERS.items())
    if path.is_dir():
        inside = sorted(one.name for one in path.glob("*.json*"))
        seen = f"is a folder; name one of the files in it ({first_few(inside)})" if inside else "is a folder"
    raise DataError(f"{path}: its format is not known; it {seen}. Known are:{known}")


def _checked(items: Items) -> Iterator[Sample | Fault]:
    """The same items; a sample that no task can use becomes a fault."""
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        try:
            fits = item.tasks()
        except DataError as exc:
            yield fault_of(item.where, exc)
            continue
        yield item if fits else Fault(item.where, "fits no task: it needs audio or text, and text or an answer to it")


def _told(faults: list[Fault]) -> str:
    """The first few faults, with how many more there are."""
    rest = len(faults) - _TOLD
    return "; ".join(str(fault) for fault in faults[:_TOLD]) + (f"; and {rest} more" if rest > 0 else "")
