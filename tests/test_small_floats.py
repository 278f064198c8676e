"""bfloat16, E4M3 and E2M1 in numpy, against ml_dtypes and torch; and the kinds of weights that are made of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from edgeomni.arrays import F32
from edgeomni.errors import UsageError
from edgeomni.quantize import small_floats
from edgeomni.quantize.schemes import Packed, dequantize, parse, quantize
from edgeomni.quantize.tensorrt_kinds import NVFP4_UNIT, SMALLEST_SCALE, half_scale, nvfp4_codes


@pytest.fixture(scope="module")
def values() -> F32:
    """Values of all sizes, ties between neighbours, and what is special."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(50_000) * np.exp(rng.uniform(-14, 9, 50_000))
    ties = np.arange(-4000, 4000) / 2**10
    special = [0.0, -0.0, 448, 464, 465, 1e9, -1e9, np.inf, -np.inf, 2.0**-10, 1.001 * 2.0**-10, np.nan, 5.0, -2.5]
    return np.concatenate([spread, ties, ties * 512, special]).astype(np.float32)


def test_e4m3_is_rounded_as_others_round_it(values: F32) -> None:
    bits = small_floats.e4m3_bits(values)
    clipped = np.clip(values, -448, 448)
    np.testing.assert_array_equal(bits & 0x7F, clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) & 0x7F)
    theirs = torch.from_numpy(clipped).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(small_floats.e4m3_values(bits), theirs.float().numpy())
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bits[number], theirs.view(torch.uint8).numpy()[number])


def test_e2m1_is_rounded_as_others_round_it(values: F32) -> None:
    number = values[~np.isnan(values)]
    theirs = np.clip(number, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    codes = small_floats.e2m1_codes(number)
    np.testing.assert_array_equal(small_floats.e2m1_values(codes), theirs.astype(np.float32))
    np.testing.assert_array_equal(codes, theirs.view(np.uint8) & 15)


def test_bfloat16_is_rounded_as_others_round_it(values: F32) -> None:
    bits = small_floats.bfloat16_bits(values)
    theirs = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(small_floats.bfloat16_values(bits), theirs.float().numpy())
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bits[number], theirs.view(torch.int16).numpy().view(np.uint16)[number])


@pytest.mark.parametrize("count", [16, 256])
def test_every_code_means_what_others_mean_by_it(count: int) -> None:
    kind, meaning = {
        16: (ml_dtypes.float4_e2m1fn, small_floats.e2m1_values),
        256: (ml_dtypes.float8_e4m3fn, small_floats.e4m3_values),
    }[count]
    codes = np.arange(count, dtype=np.uint8)
    np.testing.assert_array_equal(meaning(codes), codes.view(kind).astype(np.float32))


@pytest.fixture
def weight() -> F32:
    """Rows of very different sizes, one of zeros."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((12, 64)) * rng.choice([1e-3, 0.05, 1.5], (12, 1))
    w[3] = 0
    return np.asarray(w, np.float32)


def test_a_bfloat16_weight_is_its_rounding(weight: F32) -> None:
    packed = quantize(weight, parse("bf16"))
    assert packed.data.nbytes == 2 * weight.size and packed.scales is None
    np.testing.assert_array_equal(dequantize(packed), torch.from_numpy(weight).bfloat16().float().numpy())


@pytest.mark.parametrize(("kind", "most"), [("int8_static", 127), ("fp8_static", 448)])
def test_static_weights_have_one_half_scale_per_row(kind: str, most: float, weight: F32) -> None:
    packed = quantize(weight, parse(kind))
    assert packed.scales is not None and packed.scales.shape == (12,) and packed.scales.min() >= SMALLEST_SCALE
    np.testing.assert_array_equal(packed.scales, packed.scales.astype(np.float16))
    smallest = np.maximum(np.abs(weight).max(1) / most, SMALLEST_SCALE)
    if kind == "int8_static":
        np.testing.assert_allclose(packed.scales, smallest, rtol=1e-3, atol=6e-8)
    assert (packed.scales >= smallest * 0.999 - 6e-8).all() and (packed.scales <= smallest * 2 + 6e-8).all()
    codes = weight.astype(np.float64) / packed.scales[:, None].astype(np.float64)
    if kind == "int8_static":
        expected = np.clip(np.round(codes), -127, 127)
    else:
        expected = np.clip(codes, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_allclose(dequantize(packed), expected * packed.scales[:, None], rtol=1e-6)
    np.testing.assert_array_equal(dequantize(packed)[3], 0)


@pytest.mark.parametrize("block", [16, 32])
def test_fp8_blocks_have_the_scale_that_errs_least(block: int) -> None:
    """By ml_dtypes: no scale among the eighths of a power of two does better, and the smallest does worse."""
    rng = np.random.default_rng(0)
    w: F32 = (0.05 * rng.standard_normal((8, 64))).astype(np.float32)
    packed = quantize(w, parse(f"fp8_b{block}"))
    assert packed.scales is not None and packed.data.shape == (8, 64 // block, block)
    read = packed.data.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * packed.scales[..., None]
    np.testing.assert_array_equal(dequantize(packed), read.reshape(8, 64))
    blocks = w.reshape(8, -1, block)
    smallest = np.abs(blocks).max(-1) / 448

    def error(scales: F32) -> F32:
        codes = np.clip(blocks / scales[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return np.asarray(np.square(codes * scales[..., None] - blocks).sum(-1), np.float32)

    tried = np.stack([error((smallest * 2 ** (i / 8)).astype(np.float16).astype(np.float32)) for i in range(8)])
    np.testing.assert_allclose(error(packed.scales), tried.min(0), rtol=0.02)
    assert error(packed.scales).sum() < 0.75 * tried[0].sum()
    with pytest.raises(UsageError, match=f"blocks of {block} do not divide"):
        quantize(w[:, :20], parse(f"fp8_b{block}"))


def test_scales_in_half_are_positive() -> None:
    found = half_scale(np.array([0, 1e-9, 0.1, 1 / 3], np.float32))
    np.testing.assert_array_equal(found, np.array([2.0**-20, 2.0**-20, 0.1, 1 / 3], np.float16).astype(np.float32))


def test_nvfp4_is_read_as_its_format_says(weight: F32) -> None:
    """E2M1 times a block's scale in E4M3 times one float32 scale, by ml_dtypes; and near the weight."""
    packed = quantize(weight, parse("nvfp4"))
    assert packed.scales is not None and packed.scales.shape == (12, 4) and packed.data.shape == (12, 4, 8)
    in_units = packed.scales / np.float32(NVFP4_UNIT)
    np.testing.assert_array_equal(in_units, in_units.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert in_units.min() > 0
    e2m1 = nvfp4_codes(packed).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    read = (e2m1.reshape(12, 4, 16) * packed.scales[..., None]).reshape(12, 64)
    np.testing.assert_array_equal(dequantize(packed), read)
    error = np.abs(read - weight).reshape(12, 4, 16).max(-1)
    assert (error <= np.abs(weight).reshape(12, 4, 16).max(-1) * 0.2 + 1e-6).all()


def test_nvfp4_takes_the_better_of_two_scales() -> None:
    """A block of 4s and 1s counts in 4s exactly; with 6 as its largest code it would not. One of 6s is the contrary."""
    for block in ([4, 4, 3, 2, 1.5, 1, 0.5, 0], [6, 4, 3, 2, 1.5, 1, 0.5, 0]):
        w: F32 = (np.array([[*block, *block]]) / 64).astype(np.float32)
        np.testing.assert_array_equal(dequantize(quantize(w, parse("nvfp4"))), w)


def test_nvfp4_takes_the_larger_scale_where_that_errs_less() -> None:
    rng = np.random.default_rng(0)
    w: F32 = rng.standard_normal((64, 16)).astype(np.float32)
    packed = quantize(w, parse("nvfp4"))
    assert packed.scales is not None
    error = np.square(dequantize(packed) - w).sum(1)
    ratios = np.abs(w).max(1) / packed.scales[:, 0]
    assert (ratios > 5).any() and (ratios < 5).any()  # both of 6 and 4 occur
    for divisor in (4, 6):
        scales = (np.abs(w).max(1) / divisor * 256).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 256
        saturated = np.clip(w / scales[:, None], -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        assert (error <= np.square(saturated * scales[:, None] - w).sum(1) + 1e-9).all()


def test_what_nvfp4_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="20 inputs, which nvfp4's blocks of 16 do not divide; use fp8"):
        quantize(np.zeros((2, 20), np.float32), parse("nvfp4"))
    largest = 6 * 448 * NVFP4_UNIT
    for size, fits in ((largest, True), (largest * 1.01, False)):
        w = np.full((1, 16), size, np.float32)
        if fits:
            np.testing.assert_array_equal(dequantize(quantize(w, parse("nvfp4"))), w)
        else:
            with pytest.raises(UsageError, match=r"too large for nvfp4; use fp8"):
                quantize(w, parse("nvfp4"))
    assert isinstance(quantize(np.zeros((0, 16), np.float32), parse("bf16")), Packed)
