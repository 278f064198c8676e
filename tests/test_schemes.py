"""Packing and unpacking, against ONNX Runtime's own quantizer and kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edgeomni.arrays import F32
from edgeomni.errors import UsageError
from edgeomni.exporters.onnx.graph import FLOAT, Graph
from edgeomni.exporters.onnx.operators import FusedOperators, PortableOperators
from edgeomni.quantize import schemes
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Kind, Packed, Scheme, dequantize, parse, quantize, register, signed_codes

BLOCKED = [Scheme(kind, block) for kind in ("int4", "int8") for block in (16, 32, 64, 128)]
SIGNED = [Scheme(s.kind, s.block, signed=True) for s in BLOCKED]
N, K = 24, 256
BITS = {"int4": 4, "int8": 8}


def weight(n: int = N, k: int = K, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def run(graph: Graph, path: Path, x: np.ndarray) -> np.ndarray:
    graph.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("scheme", BLOCKED, ids=str)
def test_codes_and_scales_are_onnx_runtimes(scheme: Scheme) -> None:
    w = weight()
    blocks = K // scheme.block
    codes = np.zeros((N, blocks, scheme.block * BITS[scheme.kind] // 8), np.uint8)
    scales, points = np.zeros(N * blocks, np.float32), np.zeros(N * ((blocks * BITS[scheme.kind] + 7) // 8), np.uint8)
    pack = native.quantize_matmul_4bits if scheme.bits == 4 else native.quantize_matmul_8bits
    pack(codes, np.ascontiguousarray(w.T), scales, points, scheme.block, N, K, True)
    ours = quantize(w, scheme)
    assert ours.scales is not None
    np.testing.assert_allclose(ours.scales, scales.reshape(N, blocks), rtol=1e-6)
    theirs = dequantize(type(ours)(scheme, K, codes, scales.reshape(N, blocks)))
    # Only exact halves between two codes may be rounded the other way.
    assert np.abs(dequantize(ours) - theirs).max() <= np.abs(scales).max() * 1.001
    assert np.mean(ours.data != codes) < 0.002


@pytest.mark.parametrize("scheme", [*BLOCKED, *SIGNED], ids=str)
@pytest.mark.parametrize("k", [K, 200])
def test_unpacking_is_within_half_a_step(scheme: Scheme, k: int) -> None:
    w = weight(k=k)
    packed = quantize(w, scheme)
    assert packed.scales is not None
    # The unsigned kinds clip what is almost the largest magnitude, with the other sign, by up to one more half.
    step = np.repeat(np.abs(packed.scales), scheme.block, axis=1)[:, :k]
    assert (np.abs(dequantize(packed) - w) <= step * (0.5001 if scheme.signed else 1.0001)).all()


@pytest.mark.parametrize("scheme", SIGNED, ids=str)
def test_signed_schemes_have_positive_scales_and_symmetric_codes(scheme: Scheme) -> None:
    packed = quantize(weight(), scheme)
    codes = signed_codes(packed)
    most = (1 << (BITS[scheme.kind] - 1)) - 1
    assert packed.scales is not None and (packed.scales > 0).all()
    assert codes.dtype == np.int8 and codes.min() >= -most and codes.max() == most
    np.testing.assert_array_equal(codes * np.repeat(packed.scales, scheme.block, 1), dequantize(packed))


@pytest.mark.parametrize("scheme", [*BLOCKED, *SIGNED, Scheme("int8_dynamic")], ids=str)
def test_rows_are_independent_and_zero_stays_zero(scheme: Scheme) -> None:
    w = weight()
    w[3], w[5, : K // 2] = 0, 0
    whole = dequantize(quantize(w, scheme))
    np.testing.assert_array_equal(dequantize(quantize(w[7:9], scheme)), whole[7:9])
    assert not whole[3].any() and not whole[5, : K // 2].any()


@pytest.mark.parametrize("scheme", [Scheme("fp32"), Scheme("fp16"), Scheme("int8_dynamic")], ids=str)
def test_unblocked_kinds(scheme: Scheme) -> None:
    w = weight()
    expected = {"fp32": 0.0, "fp16": 2e-3, "int8_dynamic": np.abs(w).max() / 250}[scheme.kind]
    assert np.abs(dequantize(quantize(w, scheme)) - w).max() <= expected


def test_many_rows_are_packed_in_slabs_alike() -> None:
    w = weight(n=8200, k=32)
    packed = quantize(w, Scheme("int8", 32))
    np.testing.assert_array_equal(packed.data[8190:], quantize(w[8190:], packed.scheme).data)


@pytest.mark.parametrize("scheme", [*BLOCKED, *SIGNED, Scheme("fp32"), Scheme("fp16"), Scheme("int8_dynamic")], ids=str)
def test_names_are_parsed_back(scheme: Scheme) -> None:
    assert parse(str(scheme)) == scheme


@pytest.mark.parametrize("scheme", SIGNED, ids=str)
@pytest.mark.parametrize("k", [K, 208])
def test_dequantize_linear_gives_our_weights(scheme: Scheme, k: int, tmp_path: Path) -> None:
    graph = Graph("portable", opset=24)
    x = graph.input("x", FLOAT, ["B", k])
    packed = quantize(weight(k=k), scheme)
    graph.output("y", FLOAT, ["B", N], PortableOperators(graph).linear(x, "w", packed))
    y = run(graph, tmp_path / "g.onnx", np.eye(k, dtype=np.float32))
    np.testing.assert_allclose(y, dequantize(packed).T, atol=1e-6)


@pytest.mark.parametrize("scheme", BLOCKED, ids=str)
def test_matmul_n_bits_computes_with_our_weights(scheme: Scheme, tmp_path: Path) -> None:
    graph = Graph("fused")
    x = graph.input("x", FLOAT, ["B", K])
    packed = quantize(weight(), scheme)
    graph.output("y", FLOAT, ["B", N], FusedOperators(graph).linear(x, "w", packed))
    given = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    y, exact = run(graph, tmp_path / "g.onnx", given), given @ dequantize(packed).T
    # The kernel rounds each block of activations to 8 bits.
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.01


@pytest.mark.parametrize(
    ("scheme", "bits", "category", "name"),
    [
        (Scheme("fp32"), 32, "float", "fp32"),
        (Scheme("fp16"), 16, "float", "fp16"),
        (Scheme("int8", 128), 8, "weight-only", "int8_b128"),
        (Scheme("int4", 32), 4, "weight-only", "int4_b32"),
        (Scheme("int4", 32, signed=True), 4, "weight-only", "int4s_b32"),
        (Scheme("int8_dynamic"), 8, "dynamic", "int8_dynamic"),
    ],
)
def test_what_a_scheme_is(scheme: Scheme, bits: int, category: str, name: str) -> None:
    assert (scheme.bits, scheme.category, str(scheme)) == (bits, category, name)
    assert scheme.blocked == ("_b" in name)
    assert parse(name) == scheme


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("int4_bx", "unknown quantization scheme 'int4_bx'; known are fp32, fp16, int8, int4, int8_dynamic"),
        ("int5_b32", "'int5'"),
        ("int4", "lacks its block size; int4_b32 is an example"),
        ("int4_b0", "'int4_b0'"),
        ("int4_b032", "'int4_b032'"),
        ("int4_b-32", "'int4_b-32'"),
        ("int4_b32 ", "'int4_b32 '"),
        ("fp16_b32", "fp16 has no block of 32; its block is 0"),
        ("int8_dynamics_b32", "int8_dynamic has no block of 32"),
        ("fp16s", "'fp16s'"),
        ("INT4_b32", "'INT4'"),
        ("q4_k_m", "needs a newer EdgeOmni"),
        ("", "''"),
    ],
)
def test_names_of_nothing_are_refused(text: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("int4", 0), "int4 has no block of 0; its block is a number of inputs"),
        (("int4", -32), "block of -32"),
        (("fp32", 32), "fp32 has no block of 32"),
        (("fp32", 0, True), "fp32 has no signed form"),
        (("int8_dynamic", 0, True), "int8_dynamic has no signed form"),
        (("nf4",), "'nf4'"),
    ],
)
def test_schemes_that_no_kind_has_are_refused(arguments: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Scheme(*arguments)


def test_a_block_of_one_is_a_block() -> None:
    assert parse("int8_b1") == Scheme("int8", 1)
    assert Scheme("int8", 1).blocked and not Scheme("fp16").blocked


RECORD = np.dtype([("scale", np.float16), ("codes", np.int8, 32)])


def pack_q8(w: F32, scheme: Scheme) -> tuple[Any, None]:
    """GGUF's q8_0 in short: records of a half-precision scale and 32 codes, and no scales of their own."""
    blocks = w.reshape(len(w), -1, scheme.block)
    records = np.zeros(blocks.shape[:2], RECORD)
    records["scale"] = np.abs(blocks).max(-1) / 127
    records["codes"] = np.rint(blocks / records["scale"][..., None].astype(np.float32))
    return records, None


def unpack_q8(p: Packed) -> F32:
    rows = p.data["codes"] * p.data["scale"][..., None].astype(np.float32)
    return np.asarray(rows.reshape(len(rows), p.k), np.float32)


def pack_f8(w: F32, _: Scheme) -> tuple[Any, F32]:
    """A float kind with one scale per row; it keeps the sign and little else."""
    return np.sign(w).astype(np.int8), np.abs(w).mean(1).astype(np.float32)


def unpack_f8(p: Packed) -> F32:
    assert p.scales is not None
    return p.data * p.scales[:, None]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds that another format's folder brings, gone after the test."""
    monkeypatch.setattr(schemes, "_KINDS", dict(schemes._KINDS))
    register(Kind("toy_q8_0", 8.5, "weight-only", pack_q8, unpack_q8, block=32))
    register(Kind("toy_f8", 8, "float", pack_f8, unpack_f8))
    register(Kind("toy_open", 6, "weight-only", pack_q8, unpack_q8, block=None))


@pytest.mark.usefixtures("toys")
def test_a_registered_kind_goes_all_the_way() -> None:
    scheme = parse("toy_q8_0")
    assert scheme == Scheme("toy_q8_0") == Scheme("toy_q8_0", 32)
    assert (scheme.bits, scheme.block, scheme.blocked, scheme.category) == (8.5, 32, True, "weight-only")
    assert str(scheme) == "toy_q8_0"
    w = weight(n=8200, k=64)
    packed = quantize(w, scheme)
    assert packed.data.dtype == RECORD and packed.data.shape == (8200, 2) and packed.scales is None
    assert packed.data.nbytes * 8 / w.size == scheme.bits
    back = dequantize(packed)
    assert back.dtype == np.float32 and np.abs(back - w).max() <= np.abs(w).max() / 200
    assert scheme_of("body.layers.0.mlp.up_proj.weight", {"body.linear": scheme}) is scheme


@pytest.mark.usefixtures("toys")
def test_registered_float_kinds_may_have_scales_and_open_kinds_a_block() -> None:
    w = weight(n=3, k=64)
    packed = quantize(w, Scheme("toy_f8"))
    np.testing.assert_allclose(dequantize(packed), np.sign(w) * np.abs(w).mean(1, keepdims=True), rtol=1e-6)
    assert not packed.scheme.blocked
    assert parse("toy_open_b32") == Scheme("toy_open", 32)
    assert np.abs(dequantize(quantize(w, parse("toy_open_b32"))) - w).max() < 0.05
    with pytest.raises(UsageError, match="toy_q8_0 has no block of 16; its block is 32"):
        Scheme("toy_q8_0", 16)
    with pytest.raises(UsageError, match="signed"):
        parse("toy_opens_b32")


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("name", ["toy_f8", "fp32", "Q8", "q 8", "", "8q", "nf4_b64", "q8-0"])
def test_names_that_are_taken_or_cannot_be_parsed_back_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        register(Kind(name, 8, "float", pack_f8, unpack_f8))


@pytest.mark.usefixtures("toys")
def test_the_s_of_signed_schemes_is_kept_apart() -> None:
    with pytest.raises(ValueError, match="ends in s"):
        register(Kind("toys", 8, "weight-only", pack_q8, unpack_q8, block=None))
    register(Kind("iq4_xs", 4.25, "weight-only", pack_q8, unpack_q8, block=32))
    assert str(parse("iq4_xs")) == "iq4_xs" and not parse("iq4_xs").signed


def test_fp32_is_not_copied() -> None:
    w = weight()
    assert quantize(w, Scheme("fp32")).data is w
