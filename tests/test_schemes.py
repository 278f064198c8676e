"""Packing and unpacking, against ONNX Runtime's own quantizer and kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edgeomni.exporters.onnx.graph import FLOAT, Graph
from edgeomni.exporters.onnx.operators import FusedOperators, PortableOperators
from edgeomni.quantize.schemes import Scheme, dequantize, parse, quantize, signed_codes

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
