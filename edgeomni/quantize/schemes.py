"""Quantization schemes: numpy pack and unpack, two functions per scheme. Layouts are ONNX Runtime's.

`int4` / `int8` block: com.microsoft MatMulNBits, symmetric around the middle code (8 / 128), one float32 scale
per block of `block` inputs of one output row. `int8_dynamic`: symmetric per output channel, for
com.microsoft DynamicQuantizeMatMul. Rounding is to nearest (RTN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32

Kind = Literal["fp32", "fp16", "int8", "int4", "int8_dynamic"]
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored. `block` counts inputs per scale (block kinds only).

    `signed` (block kinds only): scales are positive and code 0 is not used, as TensorRT asks for; otherwise a scale
    takes the sign that lets a block's largest magnitude use the full range.
    """

    kind: Kind
    block: int = 0
    signed: bool = False

    @property
    def bits(self) -> int:
        return {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int8_dynamic": 8}[self.kind]

    @property
    def blocked(self) -> bool:
        return self.kind in ("int4", "int8")

    def __str__(self) -> str:
        return f"{self.kind}{'s' * self.signed}_b{self.block}" if self.blocked else self.kind


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] as stored. Blocked: data uint8 [n, blocks, block*bits/8], scales float32 [n, blocks].

    int8_dynamic: data int8 [n, k], scales float32 [n]. Float kinds: data [n, k], no scales.
    """

    scheme: Scheme
    k: int
    data: NDArray[Any]
    scales: F32 | None = None


def parse(text: str) -> Scheme:
    """Inverse of str(scheme): 'int4_b32' -> Scheme('int4', 32), 'int4s_b32' -> Scheme('int4', 32, signed=True)."""
    kind, _, block = text.partition("_b")
    return Scheme(kind.removesuffix("s"), int(block) if block else 0, kind.endswith("s"))  # type: ignore[arg-type]


def quantize(w: F32, scheme: Scheme) -> Packed:
    """w [n, k] float32 -> Packed. Worked in slabs of rows, so that a large table costs no second copy."""
    if scheme.kind in ("fp32", "fp16"):
        return Packed(scheme, w.shape[1], np.ascontiguousarray(w, np.float16 if scheme.kind == "fp16" else np.float32))
    pack = _pack_blocks if scheme.blocked else _pack_channels
    slabs = [pack(w[i : i + _ROWS_AT_ONCE], scheme) for i in range(0, len(w), _ROWS_AT_ONCE)]
    data, scales = (np.concatenate(parts) for parts in zip(*slabs, strict=True))
    return Packed(scheme, w.shape[1], data, scales)


def dequantize(p: Packed) -> F32:
    """Packed -> [n, k] float32: exactly what the kernels multiply with."""
    if p.scales is None:
        return p.data.astype(np.float32)
    if p.scheme.kind == "int8_dynamic":
        return p.data.astype(np.float32) * p.scales[:, None]
    codes = (_nibbles(p.data) if p.scheme.kind == "int4" else p.data).astype(np.float32)
    middle = 1 << (p.scheme.bits - 1)
    rows = ((codes - middle) * p.scales[:, :, None]).reshape(len(codes), -1)
    return np.ascontiguousarray(rows[:, : p.k])


def signed_codes(p: Packed) -> NDArray[np.int8]:
    """Codes of a blocked weight around 0, int8 [n, k]: times its scale, each is the weight."""
    codes = _nibbles(p.data) if p.scheme.kind == "int4" else p.data
    centred = codes - np.uint8(1 << (p.scheme.bits - 1))  # wraps around, which is what two's complement wants
    return centred.reshape(len(codes), -1)[:, : p.k].view(np.int8)


def _pack_blocks(w: F32, scheme: Scheme) -> tuple[NDArray[np.uint8], F32]:
    n, k = w.shape
    blocks = -(-k // scheme.block)
    if pad := blocks * scheme.block - k:
        w = np.pad(w, ((0, 0), (0, pad)))
    x = np.ascontiguousarray(w, np.float32).reshape(n, blocks, scheme.block)
    middle = 1 << (scheme.bits - 1)
    if scheme.signed:
        scales = (np.abs(x).max(-1) / (middle - 1)).astype(np.float32)
    else:  # the largest magnitude lands on the lowest code, which alone uses the full range: code 0 = -middle
        peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
        scales = (peak / -middle).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(x * inverse[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return (_pack_nibbles(codes) if scheme.bits == 4 else codes), scales


def _pack_channels(w: F32, scheme: Scheme) -> tuple[NDArray[np.int8], F32]:
    scales = np.maximum(np.abs(w).max(1) / 127, np.float32(1e-12)).astype(np.float32)
    return np.clip(np.rint(w / scales[:, None]), -127, 127).astype(np.int8), scales


def _pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low, high = codes[..., 0::2], codes[..., 1::2]
    return low | (high << np.uint8(4))


def _nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = np.empty((*data.shape[:-1], data.shape[-1] * 2), np.uint8)
    out[..., 0::2] = data & 15
    out[..., 1::2] = data >> 4
    return out
