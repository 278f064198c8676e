"""Which other files an ONNX file reads, and its operators' version, without the package onnx, which a device lacks.

ONNX is protobuf: a message is a row of fields, each a key (field number and wire type) and a value. Only the fields
that lead to a tensor's external data are followed (onnx.proto3 of ONNX 1.23); all others are stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from .errors import BundleError

_NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "entry"},
}
"""Message -> field number -> message within it. An "entry" is a key (1) and a value (2), both text."""
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_OPSET, _DOMAIN, _VERSION = 8, 1, 2
"""Fields of the model and of an entry of its opsets."""

OLD_OPSET, NEW_OPSET_NEEDS = 23, (1, 25)
"""The newest opset of which every ONNX Runtime that EdgeOmni takes has all operators, and the first ONNX Runtime that
has those of opset 24 which the portable flavour and TensorRT's graphs use."""

Span = tuple[int, int]


def external_files(path: Path) -> set[str]:
    """The locations of all external data, as the file spells them. Raises BundleError for what is no ONNX file."""
    if not path.stat().st_size:
        return set()
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return set(_locations(data))
        except (IndexError, ValueError) as exc:
            raise BundleError(f"{path}: is no ONNX file ({exc}); export the checkpoint again") from exc


def opset(path: Path) -> int:
    """The version of ONNX's own operators that a graph is written in; 0 where the file does not say, or is no graph."""
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            spans = [span for number, span in _fields(data, (0, len(data))) if number == _OPSET]
            return max((_version(data, span) for span in spans), default=0)
    except (OSError, IndexError, ValueError):
        return 0


def _version(data: mmap.mmap, span: Span) -> int:
    """Of an entry of the model's opsets; 0 for those of another domain than ONNX's own."""
    at, end = span
    version = 0
    while at < end:
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key == _DOMAIN << 3 | _BYTES:
            if data[at : at + value] not in (b"", b"ai.onnx"):
                return 0
            at += value
        elif key == _VERSION << 3 | _VARINT:
            version = value
        else:
            raise ValueError("an opset of neither domain nor version")
    return version


def _locations(data: mmap.mmap) -> Iterator[str]:
    waiting: list[tuple[str, Span]] = [("model", (0, len(data)))]
    while waiting:
        kind, span = waiting.pop()
        if kind == "entry":
            yield from _location(data, span)
            continue
        inner = _NESTED[kind]
        waiting += [(inner[number], found) for number, found in _fields(data, span) if number in inner]


def _location(data: mmap.mmap, span: Span) -> Iterator[str]:
    """The value of an entry "location". Fields may stand several times; every reading of them is given."""
    texts = [(number, data[start:end]) for number, (start, end) in _fields(data, span)]
    if (_KEY, b"location") in texts:
        yield from (text.decode("utf-8") for number, text in texts if number == _VALUE)


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and span of the fields within `span` that hold text, bytes or a message."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        number, wire = (key & 0xFFFFFFFF) >> 3, key & 7  # protobuf keeps 32 bits of a key
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            if at + size <= end:
                yield number, (at, at + size)
            at += size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("a field is longer than what holds it")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")
