"""GGUF's block types, judged by a second implementation written from ggml's description of the blocks."""

from __future__ import annotations

import numpy as np
import pytest

from edgeomni.errors import UsageError
from edgeomni.quantize import ggml_quants, gguf_kinds
from edgeomni.quantize.schemes import Packed, Scheme, dequantize, kind_of, quantize


def q8_0(block: np.ndarray) -> bytes:
    """A float16 scale of absmax / 127, then 32 signed codes."""
    scale = np.float32(np.abs(block).max() / np.float32(127))
    codes = np.round(block / scale) if scale else np.zeros(32)
    return np.float16(scale).tobytes() + codes.astype(np.int8).tobytes()


def q4_0(block: np.ndarray) -> bytes:
    """A float16 scale of the largest magnitude over -8, then 16 bytes: code i low, code i + 16 high, 8 the middle."""
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


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_ggml_packs_as_the_gguf_package_does(kind: str) -> None:
    from gguf import GGMLQuantizationType, quants

    rows = np.random.default_rng(2).standard_normal((6, 128)).astype(np.float32)
    rows[3, :32] = 0
    expected = quants.quantize(rows, GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(quantize(rows, Scheme(kind)).data, expected)


@pytest.mark.parametrize(("kind", "worst"), [("q4_k", 0.12), ("q5_k", 0.06), ("q6_k", 0.04)])
def test_k_quants_come_back_near(kind: str, worst: float) -> None:
    rows = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32)
    error = np.abs(dequantize(quantize(rows, Scheme(kind))) - rows).max()
    assert 0 < error < worst * np.abs(rows).max()


def test_an_importance_moves_the_error_where_it_matters_less() -> None:
    rows = np.random.default_rng(4).standard_normal((32, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 4 == 0, 100, 0.01).astype(np.float32)
    plain, weighed = (
        dequantize(Packed(Scheme("q4_k"), 256, ggml_quants.quantize(rows, "Q4_K", given)))
        for given in (None, importance)
    )
    errors = [float((importance * (back - rows) ** 2).mean()) for back in (plain, weighed)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("rows", "importance", "message"),
    [
        (np.full((1, 32), np.nan, np.float32), None, "holds values that are not finite"),
        (np.ones((1, 48), np.float32), None, "takes multiples of 32"),
        (np.ones((1, 32), np.float32), np.ones(31, np.float32), "an importance must be 32 finite numbers"),
        (np.ones((1, 32), np.float32), -np.ones(32, np.float32), "an importance must be 32 finite numbers"),
    ],
)
def test_what_ggml_would_end_the_process_for(rows: np.ndarray, importance: np.ndarray | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ggml_quants.quantize(rows, "Q4_0", importance)


def test_bfloat16_is_torch_s() -> None:
    import torch

    rows = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    rows[0, :4] = [np.inf, -np.inf, np.nan, 3.3895314e38]
    expected = torch.from_numpy(rows).bfloat16()
    found = quantize(rows, Scheme("bf16")).data.view(np.uint16)
    finite = ~np.isnan(rows)
    np.testing.assert_array_equal(found[finite], expected.view(torch.int16).numpy().view(np.uint16)[finite])
    assert np.isnan(dequantize(quantize(rows, Scheme("bf16")))[0, 2])
