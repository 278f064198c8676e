"""llama.cpp's importance matrices: how much each input column of a linear layer matters when its weights are rounded.

An entry is the mean over calibration tokens of the column's input squared (llama.cpp, tools/imatrix). Two layouts are
read: GGUF, with <tensor>.in_sum2 (sums of squares) and <tensor>.counts, and the older binary one (imatrix.dat), which
stores the means times a number of calls.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from ..arrays import F32
from ..errors import DataError
from ..gguf_files import MAGIC, GgufFile
from ..gguf_files import read as read_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_REMEDY = "copy it again, or make it again with llama.cpp's llama-imatrix"


def read(path: str | Path) -> dict[str, F32]:
    """GGUF name of a weight tensor ("blk.0.attn_q.weight") -> importance per input column, float32 [k].

    Where a tensor holds several matrices (experts), theirs follow one another. Columns never seen have importance 1,
    as in llama.cpp. Raises DataError for a file that is missing, damaged, or no importance matrix, and EngineError
    where it is GGUF and the gguf package is not installed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
        found = _of_gguf(read_gguf(path, DataError)) if begin == MAGIC else _of_binary(path, path.read_bytes())
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    if not found:
        raise DataError(f"{path}: is an importance matrix without entries; {_REMEDY}")
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise DataError(f"{path}: {name[:60]!r} has entries that are negative or no numbers; {_REMEDY}")
    return found


def _of_gguf(file: GgufFile) -> dict[str, F32]:
    kind = file.get("general.type", str, "")
    if kind != "imatrix":
        raise DataError(f"{file.path}: is a GGUF file of the type {kind[:40]!r}, not an importance matrix")
    names = {name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)}
    if alone := sorted(names ^ {name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)}):
        raise DataError(f"{file.path}: has only one of {_SUMS} and {_COUNTS} of {alone[0][:60]!r}; {_REMEDY}")
    return {name: _means(file, name) for name in sorted(names)}


def _means(file: GgufFile, name: str) -> F32:
    kinds = {file.tensors[name + end].type for end in (_SUMS, _COUNTS)}
    sums, counts = file.rows(name + _SUMS), file.rows(name + _COUNTS)
    sums = sums.reshape(-1, sums.shape[-1] if sums.ndim else 1)
    if kinds != {"F32"} or counts.size != len(sums):
        raise DataError(f"{file.path}: the sums and counts of {name[:60]!r} do not fit together; {_REMEDY}")
    counts = np.round(counts.reshape(-1, 1))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32).ravel()


def _of_binary(path: Path, data: bytes) -> dict[str, F32]:
    """Entries of the older layout; what follows them (chunks, the name of the text) is not needed."""
    place, found = 0, dict[str, F32]()

    def taken(size: int) -> bytes:
        nonlocal place
        if size < 0 or place + size > len(data):
            raise DataError(f"{path}: is no importance matrix, or ends too early; {_REMEDY}")
        place += size
        return data[place - size : place]

    def number() -> int:
        return int(struct.unpack("<i", taken(4))[0])

    for _ in range(number()):
        name = taken(number()).decode("utf-8", errors="replace")
        calls = number()
        values = np.frombuffer(taken(4 * number()), "<f4")
        if not name or name in found or not len(values):
            raise DataError(f"{path}: is no importance matrix: an entry {name[:60]!r} is empty or repeated; {_REMEDY}")
        found[name] = (values / calls if calls > 0 else values).astype(np.float32)
    return found
