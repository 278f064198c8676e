"""Embedding rows read from a bundle's file: memory-mapped, dequantized row by row, never loaded whole."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.errors import BundleError, EngineError, UsageError
from edgeomni.quantize import tensorrt_kinds  # makes the kinds known  # noqa: F401
from edgeomni.quantize.schemes import Packed, dequantize, parse
from edgeomni.quantize.small_floats import bfloat16_values

_DTYPES = {
    "float": np.float32,
    "float16": np.float16,
    "uint8": np.uint8,
    "int8": np.uint8,
    "int4": np.uint8,
    "bfloat16": np.uint16,
}
_SCALES = {"float": np.float32, "float16": np.float16}
_AT_ONCE = 64
"""Rows read before the pages around them are given back."""


class RowTable:
    """One embedding table; `table` is its entry in the manifest's meta["tables"] (exporters/onnx/llm.py)."""

    def __init__(self, root: Path, table: dict[str, Any]) -> None:
        try:
            self.rows, self.width = int(table["rows"]), int(table["width"])
            self._scheme = parse(table["scheme"])
            self._code_bits = int(self._scheme.bits)
            dtype = str(table["codes"]["dtype"])
            self._signed = dtype.startswith("int")
            with (root / table["file"]).open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            raw = np.frombuffer(self._map, np.uint8)
            self._codes = _view(raw, table["codes"]["offset"], _DTYPES[dtype], self.rows, self._row_items())
            self._scales = None
            if "scales" in table:
                scales = _SCALES[table["scales"]["dtype"]]
                self._scales = _view(raw, table["scales"]["offset"], scales, self.rows, self._blocks())
        except (KeyError, TypeError, ValueError, OSError, UsageError) as exc:
            raise BundleError(f"{root}: an embedding table cannot be read ({exc}); export again") from exc
        self._touched = 0
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    def __getitem__(self, ids: NDArray[np.integer[Any]]) -> F32:
        """ids [n] -> rows [n, width] float32. Raises EngineError for an id that the table does not have."""
        if (missing := (ids < 0) | (ids >= self.rows)).any():
            raise EngineError(f"id {ids[missing][0]} has no row among the {self.rows} of its table; check the ids")
        if len(ids) <= _AT_ONCE:
            return self._read(ids)
        few, places = np.unique(ids, return_inverse=True)  # a prompt is mostly the same few specials
        rows: F32 = np.concatenate([self._read(few[i : i + _AT_ONCE]) for i in range(0, len(few), _AT_ONCE)])
        return rows[places]

    def _read(self, ids: NDArray[np.integer[Any]]) -> F32:
        codes = self._codes[ids]
        scales = None if self._scales is None else self._scales[ids].astype(np.float32, copy=False)
        self._release(len(ids))
        if scales is None:
            floats: F32 = bfloat16_values(codes) if codes.dtype == np.uint16 else codes.astype(np.float32, copy=False)
            return floats
        codes = self._whole_blocks(codes)
        if self._signed:  # two's complement back to codes around the middle one
            codes ^= np.uint8(0x80 if self._code_bits == 8 else 0x88)
        return dequantize(Packed(self._scheme, self.width, codes, scales))

    def _release(self, rows: int) -> None:
        """Unmaps pages now and then: each row that is touched maps up to half a megabyte of page cache around it."""
        self._touched += rows
        if self._touched > _AT_ONCE and hasattr(mmap, "MADV_DONTNEED"):
            self._touched = 0
            self._map.madvise(mmap.MADV_DONTNEED)

    def _blocks(self) -> int:
        return -(-self.width // self._scheme.block)

    def _row_items(self) -> int:
        """Items of one row as stored: unsigned blocked codes are padded to whole blocks, signed ones are not."""
        if not self._scheme.blocked:
            return self.width
        padded = self.width if self._signed else self._blocks() * self._scheme.block
        return padded * self._code_bits // 8

    def _whole_blocks(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        per_block = self._scheme.block * self._code_bits // 8
        if missing := self._blocks() * per_block - codes.shape[1]:
            codes = np.pad(codes, ((0, 0), (0, missing)))
        return codes.reshape(len(codes), self._blocks(), per_block)


def _view(raw: NDArray[np.uint8], offset: int, dtype: Any, rows: int, items: int) -> NDArray[Any]:
    size = rows * items * np.dtype(dtype).itemsize
    if offset < 0 or offset + size > raw.size:
        raise ValueError(f"bytes {offset} to {offset + size} of a file of {raw.size}")
    view: NDArray[Any] = raw[offset : offset + size].view(dtype).reshape(rows, items)
    return view
