"""GGUF's tensor types as kinds of schemes: rows in blocks whose scales are part of their data.

Layouts and rounding are ggml's (ggml/src/ggml-quants.c of ggml-org/llama.cpp). Rows are packed by ggml itself
(ggml_quants.py) and unpacked by the `gguf` package; both are imported when a weight is. Importing this module makes the
kinds known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import UsageError
from . import small_floats  # makes the kind bf16 known  # noqa: F401
from .ggml_quants import quantize
from .schemes import Kind, Packed, Scheme, register

TYPES = {
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "q4_0": "Q4_0",
    "q5_0": "Q5_0",
    "q5_1": "Q5_1",
    "q8_0": "Q8_0",
    "q4_k": "Q4_K",
    "q5_k": "Q5_K",
    "q6_k": "Q6_K",
}
"""Kind -> the name of the GGML type that holds it."""
_BLOCKS = {"q4_0": 32, "q5_0": 32, "q5_1": 32, "q8_0": 32, "q4_k": 256, "q5_k": 256, "q6_k": 256}
_BITS = {"q4_0": 4.5, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
_NARROWER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Kind -> what llama.cpp stores rows in whose inputs are no multiple of 256 (`tensor_type_fallback`)."""


def fitting(kind: str, width: int) -> str:
    """`kind`, or for rows of `width` inputs that its blocks of 256 do not divide, the kind that llama.cpp takes."""
    return _NARROWER[kind] if kind in _NARROWER and width % _BLOCKS[kind] else kind


def check_width(name: str, width: int, scheme: Scheme) -> None:
    """Raises UsageError where rows of `width` inputs cannot be cut into the scheme's blocks."""
    if scheme.block and width % scheme.block:
        raise UsageError(
            f"{name} has {width} inputs, which {scheme.kind} cannot store: it takes multiples of {scheme.block}; "
            "use f16 there (--llm gguf:f16, or --heads f16 for the heads)"
        )


def _pack(type_name: str) -> Callable[[F32, Scheme], tuple[NDArray[np.uint8], None]]:
    def pack(w: F32, scheme: Scheme) -> tuple[NDArray[np.uint8], None]:
        check_width("a weight", w.shape[1], scheme)
        return quantize(w, type_name), None

    return pack


def _pack_weighed(type_name: str) -> Callable[[F32, F32], NDArray[np.uint8]]:
    return lambda w, importance: quantize(w, type_name, importance)


def _unpack(type_name: str) -> Callable[[Packed], F32]:
    def unpack(p: Packed) -> F32:
        from gguf import GGMLQuantizationType, quants

        floats: Any = quants.dequantize(p.data, GGMLQuantizationType[type_name])
        return np.ascontiguousarray(floats, np.float32).reshape(len(p.data), p.k)

    return unpack


for _kind, _block in _BLOCKS.items():
    _of_type = _pack(TYPES[_kind]), _unpack(TYPES[_kind])
    _weighed = _pack_weighed(TYPES[_kind])
    register(Kind(_kind, _BITS[_kind], "weight-only", *_of_type, block=_block, pack_weighed=_weighed))
