"""GGUF files of any origin, read on this side alone: metadata, and tensors dequantized to float32.

Layout: the specification of GGUF 3 (ggml, docs/gguf.md), of which version 2 is the same. The gguf package has a reader
too, and what it knows of types and of dequantizing is used here; but it believes every count in a file, so that one
wrong bit can make it loop until memory ends. Here every count is checked against the bytes that are left.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import F32
from .errors import EdgeOmniError, EngineError
from .install_hint import install_command

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types -> struct's, little-endian. 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
REMEDY = "download or copy it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape` as numpy has it (rows first), GGML's name of its type, where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A file that was read: `metadata` holds numbers, strings, lists of strings and arrays of numbers.

    `error` is what everything that is wrong with the file is raised as.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    error: type[EdgeOmniError]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The metadata value of that name and kind; `default` where the file has none. Raises `error` for others."""
        value = self.metadata.get(key, default)
        if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise self.error(f"{self.path}: {key} is {str(value)[:40]!r}, which it cannot be; {REMEDY}")
        return value

    def rows(self, name: str) -> F32:
        """A tensor dequantized, float32 of its shape, a copy. Raises `error` for types that cannot be dequantized."""
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start)
        if len(raw) != tensor.size:
            raise self.error(f"{self.path}: ends within the tensor {name}; {REMEDY}")
        gguf = _package()
        kind = gguf.GGMLQuantizationType[tensor.type]
        packed = raw.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, kind)) if tensor.shape else raw
        try:
            with np.errstate(all="ignore"):  # damaged scales give NaN, which whoever uses the numbers looks for
                values = gguf.dequantize(packed, kind)
        except NotImplementedError as exc:
            raise self.error(
                f"{self.path}: {name} is of the type {tensor.type}, which cannot be dequantized here; use a file of "
                "another type (F16, Q8_0, Q4_0, the K types)"
            ) from exc
        return np.ascontiguousarray(values, np.float32).reshape(tensor.shape)


def is_gguf(path: Path) -> bool:
    """Whether a regular file of that path begins as GGUF files do, or is named as one."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path, error: type[EdgeOmniError]) -> GgufFile:
    """The metadata and the tensors' places of a GGUF file; no tensor is read yet.

    Raises `error` for a file that is missing, no GGUF, truncated, or contradicts itself, and EngineError where the
    gguf package is not installed.
    """
    _package()
    try:
        data = np.memmap(path, np.uint8, "r")
        reader = _Reader(data)
        metadata, tensors = reader.contents()
    except OSError as exc:
        raise error(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, struct.error) as exc:  # numpy's for an empty file, ours for all else
        raise error(f"{path}: is no GGUF file that can be read ({exc}); {REMEDY}") from exc
    return GgufFile(path, metadata, tensors, error)


def _package() -> Any:
    try:
        import gguf
    except ImportError as exc:
        raise EngineError(f"the gguf package, which reads GGUF files, is missing; {install_command('gguf')}") from exc
    return gguf


class _Reader:
    """A place in the file, that moves on with what is read. Raises ValueError that says what does not fit."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.place = data, 0

    def contents(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if bytes(self.data[:4]) != MAGIC:
            raise ValueError("it does not begin as one")
        self.place = 4
        version = self.number("I")
        if version not in _VERSIONS:
            other = "written for the other byte order" if version & 0xFFFF == 0 else f"of version {version}"
            raise ValueError(f"it is {other}; versions 2 and 3, little-endian, can be read")
        tensors, pairs = self.count(24), self.count(13)
        metadata = dict[str, Any]()
        for _ in range(pairs):
            key = self.text()
            if key in metadata:
                raise ValueError(f"{key[:60]!r} is given twice")
            metadata[key] = self.value(self.number("I"))
        return metadata, self.places(tensors, metadata)

    def places(self, count: int, metadata: Mapping[str, Any]) -> dict[str, StoredTensor]:
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}")
        found = [self.tensor() for _ in range(count)]
        begin = -(-self.place // alignment) * alignment
        tensors = dict[str, StoredTensor]()
        for name, shape, kind, size, offset in found:
            if name in tensors:
                raise ValueError(f"the tensor {name[:60]!r} is given twice")
            if begin + offset + size > len(self.data):
                raise ValueError(f"it ends before the tensor {name[:60]!r} does")
            tensors[name] = StoredTensor(name, shape, kind, begin + offset, size)
        return tensors

    def tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """Name, shape, type, size in bytes, and offset from where the tensors begin."""
        gguf = _package()
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind = gguf.GGMLQuantizationType(self.number("I"))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if (shape[-1] if shape else 1) % block:
            raise ValueError(f"rows of {shape[-1]} numbers cannot be of the type {kind.name}")
        return name, shape, kind.name, math.prod(shape) // block * size, self.number("Q")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value is of the unknown type {kind}")
        kind = self.number("I")
        if kind == _STRING:
            return [self.text() for _ in range(self.count(8))]
        if kind not in _SCALARS:
            raise ValueError(f"an array is of the type {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        return self.taken(self.count(dtype.itemsize) * dtype.itemsize).view(dtype).copy()

    def text(self) -> str:
        return bytes(self.taken(self.count(1))).decode("utf-8", errors="replace")

    def count(self, least: int) -> int:
        """A count of things that take `least` bytes each, of which so many are left."""
        count = self.number("Q")
        if count * least > len(self.data) - self.place:
            raise ValueError(f"it announces {count} entries, and ends before them")
        return int(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", bytes(self.taken(struct.calcsize(f"<{code}"))))[0]

    def taken(self, size: int) -> np.ndarray:
        end = self.place + size
        if end > len(self.data):
            raise ValueError("it ends within its header")
        piece = self.data[self.place : end]
        self.place = end
        return piece
