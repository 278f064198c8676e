"""GGUF's block types, judged by a second implementation written from ggml's description of the blocks."""

from __future__ import annotations

import numpy as np
import pytest

from edgeomni.errors import UsageError
from edgeomni.quantize import gguf_kinds
from edgeomni.quantize.schemes import Scheme, dequantize, kind_of, quantize


def q8_0(block: np.ndarray) -> bytes:
    """A float16 scale of absmax / 127, then 32 signed codes."""
    scale = np.float32(np.abs(block).max() / np.float32(127))
    codes = np.round(block / scale) if scale else np.zeros(32)
    return np.float16(scale).tobytes() + codes.astype(np.int8).tobytes()


def q4_0(block: np.ndarray) -> bytes:
    """A float16 scale of the largest magnitude over -8, then 16 bytes: code i low, code i + 16 high, 8 in the middle."""
    peak = block[np.abs(block).argmax()]
    scale = np.float32(peak / np.float32(-8))
    codes = (
        np.minimum(15, np.floor(block / scale + np.float32(8.5))).astype(np.uint8)
        if scale
        else np.full(32, 8, np.uint8)
    )
    return np.float16(scale).tobytes() + (codes[:16] | codes[16:] << 4).astype(np.uint8).tobytes()


@pytest.mark.parametrize(("kind", "block"), [("q8_0", q8_0), ("q4_0", q4_0)])
def test_blocks_are_ggmls(kind: str, block: object) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    rows[2, 32:64] = 0
    expected = [b"".join(block(part) for part in row.reshape(3, 32)) for row in rows]  # type: ignore[operator]
    packed = quantize(rows, Scheme(kind))
    assert [bytes(row) for row in packed.data] == expected and packed.scales is None


@pytest.mark.parametrize(("kind", "bits", "worst"), [("bf16", 16, 2**-8), ("q8_0", 8.5, 0.5 / 127 * 1.01)])
def test_what_comes_back_is_near_what_went_in(kind: str, bits: float, worst: float) -> None:
    rows = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    packed = quantize(rows, Scheme(kind))
    back, scheme = dequantize(packed), kind_of(kind)
    assert back.shape == rows.shape and back.dtype == np.float32
    blocks = np.abs(rows).reshape(4, 2, 32).max(-1, keepdims=True)
    assert (np.abs(back - rows).reshape(4, 2, 32) <= worst * blocks).all()
    assert (scheme.bits, 8 * packed.data.nbytes / rows.size) == (bits, bits)


def test_every_kind_says_how_many_bits_it_takes() -> None:
    rows = np.ones((2, 256), np.float32)
    for kind in set(gguf_kinds.TYPES) - {"fp32", "fp16"}:
        assert 8 * quantize(rows, Scheme(kind)).data.nbytes / rows.size == kind_of(kind).bits


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(UsageError, match="48 inputs, which q8_0 cannot store: it takes multiples of 32"):
        quantize(np.ones((2, 48), np.float32), Scheme("q8_0"))
