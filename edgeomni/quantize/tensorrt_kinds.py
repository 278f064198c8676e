"""Integer weights as TensorRT's weight-only products take them: symmetric codes, one positive half-precision scale.

`int4_f16` / `int8_f16`: one scale per block of inputs of one output row. The lowest code (-8, -128) is not used, zero
points do not exist, and the codes are chosen for the scale as it is stored. Codes are kept in the layout of the kinds
int4 and int8 (schemes.py); scales are float32 numbers that half precision holds exactly. Importing this module makes
the kinds known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from .schemes import Kind, Packed, Scheme, dequantize, quantize, register

INTEGERS = {"int4": "int4_f16", "int8": "int8_f16"}
"""Kind of schemes.py -> the kind with half-precision scales."""
SMALLEST_SCALE = 2.0**-20
"""TensorRT wants positive scales: those of blocks of zeros, or of next to nothing, become this, which half holds."""
_PLAIN = {new: old for old, new in INTEGERS.items()}


def _pack(w: F32, scheme: Scheme) -> tuple[NDArray[Any], F32]:
    """Rounds the scales of the plain kind to half precision, and chooses the codes anew by them."""
    plain = Scheme(_PLAIN[scheme.kind], scheme.block, signed=True)
    packed = quantize(w, plain)
    assert packed.scales is not None
    scales = np.maximum(packed.scales, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
    most = (1 << (int(scheme.bits) - 1)) - 1
    n, blocks = scales.shape
    padded = np.pad(w, ((0, 0), (0, blocks * scheme.block - w.shape[1]))).reshape(n, blocks, scheme.block)
    codes = (np.clip(np.rint(padded / scales[..., None]), -most, most) + most + 1).astype(np.uint8)
    if scheme.bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return codes, scales


def _unpack(p: Packed) -> F32:
    return dequantize(Packed(Scheme(_PLAIN[p.scheme.kind], p.scheme.block, signed=True), p.k, p.data, p.scales))


for _kind, _bits in (("int4_f16", 4), ("int8_f16", 8)):
    register(Kind(_kind, _bits, "weight-only", _pack, _unpack, block=None))
