"""Weights as TensorRT's products take them. Importing this module makes the kinds known.

`int4_f16` / `int8_f16`, for weight-only products: symmetric codes with one positive scale per block of inputs of one
output row. The lowest code (-8, -128) is not used, zero points do not exist, and the codes are chosen for the scale as
it is stored. Codes are kept in the layout of the kinds int4 and int8 (schemes.py).

`fp8`, for weight-only products: E4M3 bits uint8 [n, blocks, block] with one scale per block of inputs.

`int8_static` / `fp8_static`, for products whose inputs are rounded to the same type with one scale per tensor, measured
beforehand: data int8 or E4M3 bits uint8 [n, k], one scale per output row.

`nvfp4`: E2M1 codes uint8 [n, blocks, 8], two to a byte, low half first; each block of 16 inputs has a scale in E4M3,
which counts in units of NVFP4_UNIT.

Scales are float32 numbers that half precision (for nvfp4: E4M3 times the unit) holds exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import UsageError
from .schemes import Kind, Packed, Scheme, code_range, dequantize, packed_codes, register
from .small_floats import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    e2m1_codes,
    e2m1_values,
    e4m3_bits,
    e4m3_values,
)

INTEGERS = {"int4": "int4_f16", "int8": "int8_f16"}
"""Kind of schemes.py -> the kind with half-precision scales."""
SMALLEST_SCALE = 2.0**-20
"""TensorRT wants positive scales: those of blocks of zeros, or of next to nothing, become this, which half holds."""
STATIC = ("int8_static", "fp8_static")
"""Kinds whose products round their inputs too."""
LARGEST_CODE = {"int8_static": 127.0, "fp8_static": E4M3_LARGEST}
"""The largest code of weights and inputs."""
_E4M3_TRIED = [2.0 ** (i / 8) for i in range(8)]
"""A float's steps double with each power of two, so that where a block's values lie between two of them matters: scales
of up to twice the smallest are tried. On Gaussian weights in blocks of 32 this halves the squared error."""
_TO_4_BITS = np.float32(2**20 + 1)
"""x * this, less (x * this - x), has x's four highest bits (T. J. Dekker, 1971, splitting)."""
NVFP4_UNIT = 2.0**-8
"""The one float32 scale of an NVFP4 weight. NVIDIA takes it from each tensor's largest value, to make use of E4M3's
range; E4M3 counts relatively, so that any unit serves as well that keeps the blocks' scales among its normal numbers.
With this one these are blocks whose largest weight lies between 4e-4 and 10, and rows do not depend on each other."""
NVFP4_BLOCK = 16
_DIVISORS = (E2M1_LARGEST, 4.0)
"""A block's largest weight becomes 6 or 4: with 4 the steps next to it are finer. What errs less is taken."""
_PLAIN = {new: old for old, new in INTEGERS.items()}


def _block_scales(x: F32, scheme: Scheme) -> F32:
    """Scales of blocks [..., block], as half precision holds them."""
    return half_scale(np.abs(x).max(-1) / ((1 << (int(scheme.bits) - 1)) - 1))


def _pack(w: F32, scheme: Scheme) -> tuple[NDArray[Any], F32]:
    """Codes for the scales as they are stored."""
    n, k = w.shape
    padded = np.pad(w, ((0, 0), (0, -k % scheme.block))).reshape(n, -1, scheme.block)
    scales = _block_scales(padded, scheme)
    lowest, highest = code_range(scheme)
    codes = np.clip(np.rint(padded / scales[..., None]), lowest, highest).astype(np.int8)
    packed = packed_codes(codes.reshape(n, -1)[:, :k], scales, scheme)
    return packed.data, scales


def _unpack(p: Packed) -> F32:
    return dequantize(Packed(Scheme(_PLAIN[p.scheme.kind], p.scheme.block, signed=True), p.k, p.data, p.scales))


def _pack_rows(w: F32, scheme: Scheme) -> tuple[NDArray[Any], F32]:
    most = LARGEST_CODE[scheme.kind]
    if scheme.kind == "fp8_static":
        scales = _e4m3_scales(w)
        return e4m3_bits(w / scales[:, None]), scales
    scales = half_scale(np.abs(w).max(1) / most)
    scaled = w / scales[:, None]
    return np.clip(np.rint(scaled), -most, most).astype(np.int8), scales


def _unpack_rows(p: Packed) -> F32:
    assert p.scales is not None
    codes = e4m3_values(p.data) if p.scheme.kind == "fp8_static" else p.data.astype(np.float32)
    return codes * p.scales[:, None]


def _pack_fp8(w: F32, scheme: Scheme) -> tuple[NDArray[np.uint8], F32]:
    n, k = w.shape
    if k % scheme.block:
        raise UsageError(f"a weight has {k} inputs, which blocks of {scheme.block} do not divide; use another --block")
    blocks = np.ascontiguousarray(w, np.float32).reshape(-1, scheme.block)
    scales = _e4m3_scales(blocks)
    codes = e4m3_bits(blocks / scales[:, None])
    return codes.reshape(n, -1, scheme.block), scales.reshape(n, -1)


def _unpack_fp8(p: Packed) -> F32:
    assert p.scales is not None
    return (e4m3_values(p.data) * p.scales[..., None]).reshape(len(p.data), p.k)


def _e4m3_scales(rows: F32) -> F32:
    """For each row [k] the scale with which E4M3 errs least, of _E4M3_TRIED times the smallest that holds the row."""
    smallest, best = np.abs(rows).max(1) / np.float32(E4M3_LARGEST), np.full(len(rows), np.inf, np.float32)
    found = half_scale(smallest)
    for factor in _E4M3_TRIED:
        scales = half_scale(smallest * np.float32(factor))
        scaled = rows / scales[:, None]
        far = scaled * _TO_4_BITS
        error = np.square((far - (far - scaled) - scaled) * scales[:, None]).sum(1)
        found, best = np.where(error < best, scales, found), np.minimum(error, best)
    return found


def half_scale(scale: Any) -> F32:
    """A positive scale as half precision holds it."""
    held: F32 = np.maximum(scale, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
    return held


def _pack_nvfp4(w: F32, scheme: Scheme) -> tuple[NDArray[np.uint8], F32]:
    n, k = w.shape
    if k % NVFP4_BLOCK:
        raise UsageError(
            f"a weight has {k} inputs, which nvfp4's blocks of {NVFP4_BLOCK} do not divide; use fp8 or fp16"
        )
    blocks = np.ascontiguousarray(w, np.float32).reshape(n, -1, NVFP4_BLOCK)
    peak = np.abs(blocks).max(-1)
    if peak.size and peak.max() > E2M1_LARGEST * E4M3_LARGEST * NVFP4_UNIT:
        raise UsageError(f"a weight of {peak.max():.3g} is too large for nvfp4; use fp8, int8 or fp16")
    tried = [_nvfp4_codes(blocks, peak / divisor) for divisor in _DIVISORS]
    finer = tried[1][2] < tried[0][2]
    codes = np.where(finer[..., None], tried[1][0], tried[0][0])
    scales = np.where(finer, tried[1][1], tried[0][1])
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4)), scales


def _nvfp4_codes(blocks: F32, wanted: F32) -> tuple[NDArray[np.uint8], F32, F32]:
    """Codes, scales and squared error of each block for the scale nearest to the one wanted."""
    scales = e4m3_values(np.maximum(e4m3_bits(wanted / np.float32(NVFP4_UNIT)), np.uint8(1))) * np.float32(NVFP4_UNIT)
    codes = e2m1_codes(blocks / scales[..., None])
    return codes, scales, np.square(e2m1_values(codes) * scales[..., None] - blocks).sum(-1)


def _unpack_nvfp4(p: Packed) -> F32:
    assert p.scales is not None
    return (e2m1_values(nvfp4_codes(p)).reshape(*p.scales.shape, -1) * p.scales[..., None]).reshape(len(p.data), p.k)


def nvfp4_codes(p: Packed) -> NDArray[np.uint8]:
    """E2M1 codes of an nvfp4 weight, one to a byte [n, k]."""
    codes = np.stack([p.data & 15, p.data >> 4], axis=-1)
    return codes.reshape(len(p.data), p.k)


for _kind, _bits in (("int4_f16", 4), ("int8_f16", 8)):
    _how: dict[str, Any] = {"block": None, "block_scales": _block_scales, "symmetric": True}
    register(Kind(_kind, _bits, "weight-only", _pack, _unpack, **_how))
for _kind in STATIC:
    register(Kind(_kind, 8, "static", _pack_rows, _unpack_rows))
register(Kind("fp8", 8, "weight-only", _pack_fp8, _unpack_fp8, block=None))
register(Kind("nvfp4", 4, "weight-only", _pack_nvfp4, _unpack_nvfp4, block=NVFP4_BLOCK))
