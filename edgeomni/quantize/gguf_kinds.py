"""GGUF's tensor types as kinds of schemes: rows in blocks whose scales are part of their data.

Layouts and rounding are ggml's (ggml/src/ggml-quants.c of ggml-org/llama.cpp), packed and unpacked by the `gguf` package,
which is imported when a weight is packed or unpacked. Importing this module makes the kinds known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import UsageError
from .schemes import Kind, Packed, Scheme, register

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q4_0": "Q4_0", "q5_0": "Q5_0", "q8_0": "Q8_0"}
"""Kind -> the name of the GGML type that holds it."""
INPUT_BLOCK = 32
"""Inputs that share a scale in q4_0, q5_0 and q8_0, and in the inputs that their kernels round."""


def check_width(name: str, width: int, scheme: Scheme) -> None:
    """Raises UsageError where rows of `width` inputs cannot be cut into the scheme's blocks."""
    if scheme.block and width % scheme.block:
        raise UsageError(
            f"{name} has {width} inputs, which {scheme.kind} cannot store: it takes multiples of {scheme.block}; "
            "use q8_0's block of 32, or f16"
        )


def _pack(type_name: str) -> Callable[[F32, Scheme], tuple[NDArray[np.uint8], None]]:
    def pack(w: F32, scheme: Scheme) -> tuple[NDArray[np.uint8], None]:
        from gguf import GGMLQuantizationType, quants

        check_width("a weight", w.shape[1], scheme)
        packed = quants.quantize(np.ascontiguousarray(w, np.float32), GGMLQuantizationType[type_name])
        return packed.view(np.uint8).reshape(len(w), -1), None

    return pack


def _unpack(type_name: str) -> Callable[[Packed], F32]:
    def unpack(p: Packed) -> F32:
        from gguf import GGMLQuantizationType, quants

        floats: Any = quants.dequantize(p.data, GGMLQuantizationType[type_name])
        return np.ascontiguousarray(floats, np.float32).reshape(len(p.data), p.k)

    return unpack


for _kind, _bits, _block in (("bf16", 16, 0), ("q4_0", 4.5, 32), ("q5_0", 5.5, 32), ("q8_0", 8.5, 32)):
    _type = TYPES[_kind]
    _category = "float" if _block == 0 else "weight-only"
    register(Kind(_kind, _bits, _category, _pack(_type), _unpack(_type), block=_block))  # type: ignore[arg-type]
