"""How one weight is stored: schemes, their names, and packing and unpacking in numpy.

A scheme is a kind ("int4", "fp16") and, where the kind leaves them open, a block size and a sign. What a kind is lies
in a table, to which `register` adds: a format or a runtime that brings kinds of its own (GGUF's q4_k, FP8, NF4)
registers them in a module that both its exporter and its runtime import, such as quantize/<name>_kinds.py.

The kinds here have the layouts of ONNX Runtime. `int4` / `int8`: com.microsoft MatMulNBits, symmetric around the
middle code (8 / 128), one float32 scale per block of `block` inputs of one output row. `int8_dynamic`: symmetric per
output channel, for com.microsoft DynamicQuantizeMatMul. Rounding is to nearest (RTN);
calibrate.py chooses codes by what a model computes with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import UsageError

Category = Literal["float", "weight-only", "dynamic", "static"]
"""float: values rounded to a narrower float. weight-only: codes, which kernels multiply with float inputs or with
inputs that they round by block. dynamic: codes, and inputs rounded with one scale per tensor. static: the same, with
a scale that was measured beforehand."""
_ROWS_AT_ONCE = 8192
_NAME = re.compile(r"(?P<kind>\w+?)(?P<signed>s)?_b(?P<block>[1-9]\d*)")
_KIND_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Kind:
    """What the name of a kind stands for.

    `bits`: how many a weight takes; kinds whose scales are part of their data count these too (q4_k: 4.5).
    `pack(rows [n, k] float32, scheme)` gives data (n rows of any dtype and shape) and scales (n rows, or None where
    the data holds them); each row must not depend on the others. `unpack(packed)` gives float32 [n, k].
    `block`: how many inputs share a scale; 0 where nothing is shared by block, None where each scheme chooses.
    `has_signed`: whether a scheme may ask for positive scales and signed codes.
    """

    name: str
    bits: float
    category: Category
    pack: Callable[[F32, Scheme], tuple[NDArray[Any], F32 | None]]
    unpack: Callable[[Packed], F32]
    block: int | None = 0
    has_signed: bool = False
    pack_weighed: Callable[[F32, F32], NDArray[Any]] | None = None
    """`pack_weighed(rows, importance [k] float32)` gives data where errors in some inputs matter more than in others;
    None where the kind knows no such thing."""
    block_scales: Callable[[F32, Scheme], F32] | None = None
    """`block_scales(x [..., block] float32, scheme)` gives the scale of each block [...]; None where a kind has no
    integer codes by block in the layout of int4 and int8."""
    symmetric: bool = False
    """Whether the lowest code is not used by any of the kind's schemes, as by signed ones."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored. `block` counts the inputs that share a scale; 0 where none do.

    `signed`: scales are positive and the lowest code is not used, as TensorRT asks for; otherwise a scale takes the
    sign that lets a block's largest magnitude use the full range. Raises UsageError for a kind that nobody
    registered, and for a block or a sign that the kind does not have.
    """

    kind: str
    block: int = 0
    signed: bool = False

    def __post_init__(self) -> None:
        fixed = kind_of(self.kind).block
        if fixed is not None and self.block in (0, fixed):
            object.__setattr__(self, "block", fixed)
        elif fixed is not None or self.block < 1:
            allowed = "a number of inputs" if fixed is None else f"{fixed}"
            raise UsageError(f"scheme {self.kind} has no block of {self.block}; its block is {allowed}")
        if self.signed and not kind_of(self.kind).has_signed:
            raise UsageError(f"scheme {self.kind} has no signed form; leave `signed` out")

    @property
    def bits(self) -> float:
        """Bits that a weight takes: those of a code (a whole number), or what its kind says."""
        return kind_of(self.kind).bits

    @property
    def category(self) -> Category:
        return kind_of(self.kind).category

    @property
    def blocked(self) -> bool:
        """Whether one scale belongs to `block` inputs of a row."""
        return self.block > 0

    def __str__(self) -> str:
        """The name that bundles hold and that `parse` reads: "fp16", "int4_b32", "int4s_b32"."""
        return f"{self.kind}{'s' * self.signed}_b{self.block}" if kind_of(self.kind).block is None else self.kind


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] as stored.

    int4, int8: data uint8 [n, blocks, block*bits/8], scales float32 [n, blocks]. int8_dynamic: data int8 [n, k],
    scales float32 [n]. fp32, fp16: data [n, k], no scales. Other kinds: as their `pack` says.
    """

    scheme: Scheme
    k: int
    data: NDArray[Any]
    scales: F32 | None = None


ChosenCodes = Callable[[str, Scheme], Packed | None]
"""A parameter's name and scheme -> the codes that were chosen for it; None where it is to be rounded to nearest."""


def register(kind: Kind) -> None:
    """Makes a kind known by its name. Raises ValueError for a name that is taken or could not be parsed back."""
    if kind.name in _KINDS:
        raise ValueError(f"a kind called {kind.name!r} is registered already; choose another name")
    if not _KIND_NAME.fullmatch(kind.name) or _NAME.fullmatch(kind.name):
        raise ValueError(f"{kind.name!r} is no name for a kind: small letters, digits and _, not ending in _b<number>")
    if kind.block is None and kind.name.endswith("s"):
        raise ValueError(f"{kind.name!r} ends in s, which marks signed schemes where each scheme chooses its block")
    _KINDS[kind.name] = kind


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises UsageError that lists the known ones."""
    if name not in _KINDS:
        raise UsageError(
            f"unknown quantization scheme {name!r}; known are {', '.join(_KINDS)}. "
            "A bundle that names another one needs a newer EdgeOmni"
        )
    return _KINDS[name]


def parse(text: str) -> Scheme:
    """Inverse of str(scheme): "int4_b32" -> Scheme("int4", 32), "int4s_b32" -> Scheme("int4", 32, signed=True).

    Raises UsageError for text that names no scheme; a reader of files translates it into its own error.
    """
    if match := _NAME.fullmatch(text):
        scheme = Scheme(match["kind"], int(match["block"]), match["signed"] is not None)
    else:
        if kind_of(text).block is None:
            raise UsageError(f"scheme {text!r} lacks its block size; {text}_b32 is an example")
        scheme = Scheme(text)
    if str(scheme) != text:
        raise UsageError(f"{text!r} is not how a scheme is written; {str(scheme)!r} is meant")
    return scheme


def quantize(w: F32, scheme: Scheme, importance: F32 | None = None) -> Packed:
    """w [n, k] float32 -> Packed. Worked in slabs of rows, so that a large table costs no second copy.

    `importance` [k] float32 tells how much an error in each input matters; kinds that know no such thing ignore it.
    """
    kind = kind_of(scheme.kind)
    if importance is not None and kind.pack_weighed is not None:
        return Packed(scheme, w.shape[1], kind.pack_weighed(w, importance))
    if kind.category == "float":  # nothing in between, and fp32 is not even copied
        return Packed(scheme, w.shape[1], *kind.pack(w, scheme))
    slabs = [kind.pack(w[i : i + _ROWS_AT_ONCE], scheme) for i in range(0, len(w), _ROWS_AT_ONCE)]
    scales = [s for _, s in slabs if s is not None]
    return Packed(scheme, w.shape[1], np.concatenate([d for d, _ in slabs]), np.concatenate(scales) if scales else None)


def dequantize(p: Packed) -> F32:
    """Packed -> [n, k] float32: exactly what the kernels multiply with."""
    return kind_of(p.scheme.kind).unpack(p)


def signed_codes(p: Packed) -> NDArray[np.int8]:
    """Codes of an int4 or int8 weight around 0, int8 [n, k]: times its scale, each is the weight."""
    codes = _codes(p) - np.uint8(_middle(p.scheme))  # wraps around, which is what two's complement wants
    return codes.reshape(len(codes), -1)[:, : p.k].view(np.int8)


def has_codes_by_block(scheme: Scheme) -> bool:
    """Whether the scheme has integer codes with one scale for each block of inputs, so that they can be chosen."""
    return kind_of(scheme.kind).block_scales is not None


def is_static(scheme: Scheme) -> bool:
    """Whether products with the weights round their inputs by ranges that were measured beforehand."""
    return kind_of(scheme.kind).category == "static"


def code_range(scheme: Scheme) -> tuple[int, int]:
    """Lowest and highest code around 0 of a scheme that has integer codes by block."""
    most = _middle(scheme) - 1
    return -most - (not scheme.signed and not kind_of(scheme.kind).symmetric), most


def packed_codes(codes: NDArray[np.int8], scales: F32, scheme: Scheme) -> Packed:
    """The inverse of `signed_codes`: codes around 0 int8 [n, k] and scales [n, blocks] as a weight of that scheme."""
    n, k = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -k % scheme.block))).reshape(n, -1, scheme.block)
    stored = padded.view(np.uint8) + np.uint8(_middle(scheme))  # wraps around, as in `signed_codes`
    return Packed(scheme, k, _pack_nibbles(stored) if scheme.bits == 4 else stored, scales)


def stacked(parts: Sequence[Packed]) -> Packed:
    """Weights of one scheme and of as many inputs, their rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    scales = [p.scales for p in parts if p.scales is not None]
    data = np.concatenate([p.data for p in parts])
    return Packed(parts[0].scheme, parts[0].k, data, np.concatenate(scales) if scales else None)


def _middle(scheme: Scheme) -> int:
    return 1 << (int(scheme.bits) - 1)


def _pack_float(dtype: type[np.floating[Any]]) -> Callable[[F32, Scheme], tuple[NDArray[Any], None]]:
    return lambda w, _: (np.ascontiguousarray(w, dtype), None)


def _unpack_float(p: Packed) -> F32:
    return p.data.astype(np.float32)


def _pack_blocks(w: F32, scheme: Scheme) -> tuple[NDArray[np.uint8], F32]:
    n, k = w.shape
    blocks = -(-k // scheme.block)
    if pad := blocks * scheme.block - k:
        w = np.pad(w, ((0, 0), (0, pad)))
    x = np.ascontiguousarray(w, np.float32).reshape(n, blocks, scheme.block)
    middle = _middle(scheme)
    scales = _block_scales(x, scheme)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(x * inverse[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return (_pack_nibbles(codes) if scheme.bits == 4 else codes), scales


def _block_scales(x: F32, scheme: Scheme) -> F32:
    middle = _middle(scheme)
    if scheme.signed:
        return np.asarray(np.abs(x).max(-1) / (middle - 1), np.float32)
    # The largest magnitude lands on the lowest code, which alone uses the full range: code 0 = -middle.
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    return np.asarray(peak / -middle, np.float32)


def _unpack_blocks(p: Packed) -> F32:
    assert p.scales is not None
    codes = _codes(p).astype(np.float32)
    rows = ((codes - _middle(p.scheme)) * p.scales[:, :, None]).reshape(len(codes), -1)
    return np.ascontiguousarray(rows[:, : p.k])


def _pack_channels(w: F32, _: Scheme) -> tuple[NDArray[np.int8], F32]:
    scales = np.maximum(np.abs(w).max(1) / 127, np.float32(1e-12)).astype(np.float32)
    return np.clip(np.rint(w / scales[:, None]), -127, 127).astype(np.int8), scales


def _unpack_channels(p: Packed) -> F32:
    assert p.scales is not None
    return p.data.astype(np.float32) * p.scales[:, None]


def _codes(p: Packed) -> NDArray[np.uint8]:
    return _nibbles(p.data) if p.scheme.bits == 4 else p.data


def _pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low, high = codes[..., 0::2], codes[..., 1::2]
    return low | (high << np.uint8(4))


def _nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = np.empty((*data.shape[:-1], data.shape[-1] * 2), np.uint8)
    out[..., 0::2] = data & 15
    out[..., 1::2] = data >> 4
    return out


_BLOCKS = _pack_blocks, _unpack_blocks
_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("fp32", 32, "float", _pack_float(np.float32), _unpack_float),
        Kind("fp16", 16, "float", _pack_float(np.float16), _unpack_float),
        Kind("int8", 8, "weight-only", *_BLOCKS, block=None, has_signed=True, block_scales=_block_scales),
        Kind("int4", 4, "weight-only", *_BLOCKS, block=None, has_signed=True, block_scales=_block_scales),
        Kind("int8_dynamic", 8, "dynamic", _pack_channels, _unpack_channels),
    )
}
