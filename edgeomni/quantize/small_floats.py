"""Floats of 16, 8 and 4 bits that numpy does not have: bfloat16, E4M3 (arXiv 2209.05433) and E2M1 (OCP MX 1.0).

Rounding is to nearest, ties to even; E4M3 and E2M1 saturate, as ONNX's QuantizeLinear does. Importing this module makes
the kind bf16 known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from .schemes import Kind, Packed, Scheme, register

E4M3_LARGEST, E2M1_LARGEST = 448.0, 6.0
_NAN = 0x7F


def bfloat16_bits(x: F32) -> NDArray[np.uint16]:
    """Nearest bfloat16 of each value, as its bits; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 64, rounded).astype("<u2")


def bfloat16_values(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_bits(x: F32) -> NDArray[np.uint8]:
    """Nearest E4M3 of each value, as its bits; beyond 448 it is 448, NaN stays NaN."""
    codes = _codes(x, _E4M3[: _NAN + 1], mantissa=3, least=-6, largest=E4M3_LARGEST)
    return np.where(np.isnan(x), np.uint8(_NAN), codes)


def e4m3_values(bits: NDArray[np.uint8]) -> F32:
    return _E4M3[bits]


def e2m1_codes(x: F32) -> NDArray[np.uint8]:
    """Nearest E2M1 of each value, as a code 0 to 15 whose highest bit is the sign; beyond 6 it is 6."""
    return _codes(x, _E2M1[:8], mantissa=1, least=0, largest=E2M1_LARGEST, sign=8)


def e2m1_values(codes: NDArray[np.uint8]) -> F32:
    return _E2M1[codes]


def _codes(
    x: F32, magnitudes: F32, *, mantissa: int, least: int, largest: float, sign: int = 0x80
) -> NDArray[np.uint8]:
    """Codes of the values of `magnitudes` nearest to x: steps of 2^-mantissa in each power of two from 2^least on."""
    size = np.minimum(np.abs(np.nan_to_num(x, nan=0.0)), np.float32(largest))
    exponent = np.maximum(np.frexp(size)[1] - 1, least)
    step = np.ldexp(np.float32(1), exponent - mantissa)
    nearest = np.rint(size / step) * step
    codes: NDArray[np.uint8] = (np.searchsorted(magnitudes, nearest) + np.where(np.signbit(x), sign, 0)).astype(
        np.uint8
    )
    return codes


def _signed(magnitudes: list[float]) -> F32:
    return np.array([*magnitudes, *(-m for m in magnitudes)], np.float32)


def _magnitudes(exponents: int, mantissa: int, least: int) -> list[float]:
    """All positive values of a float in order of their bits, the subnormal ones first."""
    unit = 1 << mantissa
    steps = [
        (m if not e else unit + m, max(e, 1) - 1 + least - mantissa) for e in range(exponents) for m in range(unit)
    ]
    return [m * 2.0**power for m, power in steps]


_E4M3 = _signed([*_magnitudes(16, 3, -6)[:_NAN], np.nan])
_E2M1 = _signed(_magnitudes(4, 1, 0))


def _pack_bf16(w: F32, _: Scheme) -> tuple[NDArray[np.uint8], None]:
    return bfloat16_bits(w).view(np.uint8), None


def _unpack_bf16(p: Packed) -> F32:
    bits: NDArray[Any] = np.ascontiguousarray(p.data).view("<u2")
    return bfloat16_values(bits.reshape(len(p.data), p.k))


register(Kind("bf16", 16, "float", _pack_bf16, _unpack_bf16))
