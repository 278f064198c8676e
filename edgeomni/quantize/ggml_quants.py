"""ggml's own quantizers, called one tensor at a time: the bytes that `llama_model_quantize` writes.

The function is `ggml_quantize_chunk` (ggml/include/ggml.h of ggml-org/llama.cpp), in the libraries that
llama-cpp-python brings. It ends the process for rows that are no whole blocks and for types that it cannot write, so
both are refused here first.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..engines import ENGINES
from ..errors import EngineError, UsageError

TYPES = {
    "Q4_0": (2, 32, 18),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}
"""GGML type -> its number in enum ggml_type, weights in a block, bytes of a block."""
_ROWS_AT_ONCE = 4096


def quantize(rows: F32, type_name: str, importance: F32 | None = None) -> NDArray[np.uint8]:
    """rows [n, k] float32 -> uint8 [n, bytes of a row].

    `importance` float32 [k] weighs the error of each input (llama.cpp's importance matrix). Raises UsageError for rows
    that are no whole blocks and for numbers that are not finite, EngineError where ggml is missing or differs.
    """
    number, block, size = TYPES[type_name]
    n, k = rows.shape
    if k % block:
        raise UsageError(f"rows of {k} inputs cannot be stored as {type_name}: it takes multiples of {block}")
    rows = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise UsageError(f"a weight that is to be stored as {type_name} holds values that are not finite")
    weights = None if importance is None else _importance(importance, k)
    out = np.empty((n, k // block * size), np.uint8)
    function = _library().ggml_quantize_chunk
    for first in range(0, n, _ROWS_AT_ONCE):
        part, target = rows[first : first + _ROWS_AT_ONCE], out[first : first + _ROWS_AT_ONCE]
        given = None if weights is None else weights.ctypes.data
        written = function(number, part.ctypes.data, target.ctypes.data, 0, len(part), k, given)
        if written != target.nbytes:
            raise EngineError(f"ggml wrote {written} bytes of {type_name}, not {target.nbytes}; {_REMEDY}")
    return out


_REMEDY = f"install the llama-cpp-python that this EdgeOmni was made with: {ENGINES['llama.cpp'].install}"


def _importance(importance: F32, k: int) -> F32:
    if importance.shape != (k,) or not np.isfinite(importance).all() or (importance < 0).any():
        raise UsageError(f"an importance must be {k} finite numbers of at least 0; make the imatrix file again")
    return np.ascontiguousarray(importance, np.float32)


@lru_cache(maxsize=1)
def _library() -> Any:
    """libggml-base. Raises EngineError where it is missing, or lays out a type otherwise than TYPES says."""
    library = ctypes.CDLL(str(_path()))
    size, integer, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = size
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    library.ggml_type_name.restype, library.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    library.ggml_blck_size.restype, library.ggml_blck_size.argtypes = integer, [ctypes.c_int]
    library.ggml_type_size.restype, library.ggml_type_size.argtypes = size, [ctypes.c_int]
    for name, (number, block, of_block) in TYPES.items():
        found = library.ggml_type_name(number), library.ggml_blck_size(number), library.ggml_type_size(number)
        if (found[0].upper(), *found[1:]) != (name.encode(), block, of_block):
            raise EngineError(f"this ggml has type {number} as {found}, not as {name}; {_REMEDY}")
    return library


def _path() -> Path:
    import os

    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder is None:
        spec = util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise EngineError(f"llama-cpp-python is not installed; {ENGINES['llama.cpp'].install}")
        folder = str(Path(next(iter(spec.submodule_search_locations))) / "lib")
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        if (path := Path(folder) / name).is_file():
            return path
    raise EngineError(f"{folder} holds no ggml-base library; {_REMEDY}")
