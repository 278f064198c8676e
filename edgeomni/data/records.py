"""Records of JSON Lines files and JSON lists, one by one, each with its line and where to read it again."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError
from ..schema import short
from .sample import Sample

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Fault:
    """One record that cannot be used: where it stands ("train.jsonl:12"), and what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Place:
    """Where a record stands in its file: `length` bytes from `offset`. `where` is what messages call it."""

    path: Path
    where: str
    offset: int
    length: int

    def load(self) -> Any:
        """The record, read again. Raises DataError where the file is not what it was."""
        try:
            with self.path.open("rb") as f:
                f.seek(self.offset)
                return parse(f.read(self.length))
        except OSError as exc:
            raise DataError(f"{self.where}: cannot be read again ({exc.strerror or exc})") from exc


@dataclass(frozen=True)
class Record:
    """One JSON object of a data file."""

    place: Place
    data: dict[str, Any]

    @property
    def where(self) -> str:
        return self.place.where

    @property
    def folder(self) -> Path:
        """The folder of the file, from which paths in it start."""
        return self.place.path.parent


Items = Iterator["Sample | Fault"]
"""What a reader gives: samples, and faults in the places of those that cannot be used."""


def parse(raw: bytes | memoryview) -> Any:
    """JSON -> plain data. Raises DataError for all else; the message does not name the file."""
    try:
        return msgspec.json.decode(raw)
    except RecursionError as exc:
        raise DataError("is no JSON (nested too deeply)") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DataError(f"is no JSON ({exc})") from exc


def json_records(path: Path) -> Iterator[Record | Fault]:
    """The objects of a JSON Lines file or of a JSON file that holds one list of them, in order.

    A line of JSON Lines that is no object is a fault, and so is an element of a list. A list that cannot be parsed
    raises DataError with its line, since nothing says where its next element would begin. Blank lines count as lines
    and hold nothing. Raises DataError for a file that cannot be read.
    """
    try:
        with path.open("rb") as f:
            start = f.read(1024).removeprefix(_BOM).lstrip(_SPACE)
            f.seek(0)
            yield from _elements(path, f.fileno()) if start.startswith(b"[") else _lines(path, f)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc})") from exc


def each(records: Iterator[Record | Fault], convert: Callable[[Record], Iterator[Sample]]) -> Items:
    """Samples of all records. A DataError of `convert` becomes the fault of its record."""
    for record in records:
        if isinstance(record, Fault):
            yield record
            continue
        try:
            yield from convert(record)
        except DataError as exc:
            yield fault_of(record.where, exc)


def fault_of(where: str, error: DataError) -> Fault:
    """The fault that an error tells of the record at `where`."""
    return Fault(where, str(error).removeprefix(f"{where}: "))


def _lines(path: Path, lines: Any) -> Iterator[Record | Fault]:
    offset = 0
    for number, line in enumerate(lines, 1):
        begin = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        place = Place(path, f"{path}:{number}", offset + begin, len(line) - begin)
        offset += len(line)
        if body := line[begin:].strip(_SPACE):
            yield _record(place, body)


def _elements(path: Path, handle: int) -> Iterator[Record | Fault]:
    """Elements of a JSON list. Between two of them stand a comma and spaces, which is how their offsets are found."""
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as whole:
        lengths = _lengths(path, whole)
        offset, line = whole.find(b"[") + 1, whole[: whole.find(b"[")].count(b"\n") + 1
        for length in lengths:
            gap = offset
            while whole[offset] in b", \t\r\n":
                offset += 1
            line += whole[gap:offset].count(b"\n")
            body = whole[offset : offset + length]
            yield _record(Place(path, f"{path}:{line}", offset, length), body)
            line += body.count(b"\n")
            offset += length


def _lengths(path: Path, whole: mmap.mmap) -> list[int]:
    """Length in bytes of each element of a JSON list."""
    begin = len(_BOM) if whole[: len(_BOM)] == _BOM else 0
    try:
        with memoryview(whole) as view, view[begin:] as body:  # released, or the map could not be closed
            return [len(memoryview(raw)) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except RecursionError as exc:
        raise DataError(f"{path}: is no JSON list (nested too deeply)") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: is no JSON list ({exc}); write one object to a line (JSON Lines)") from exc


def _record(place: Place, body: bytes) -> Record | Fault:
    try:
        data = parse(body)
    except DataError as exc:
        return Fault(place.where, str(exc))
    if not isinstance(data, dict):
        return Fault(place.where, f"holds {short(data)} instead of an object")
    return Record(place, data)
