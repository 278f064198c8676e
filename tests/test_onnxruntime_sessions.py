"""Sessions: errors in our words, devices, threads, and what the optimised graph says about its kernels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from edgeomni.errors import EngineError, UsageError
from edgeomni.exporters.onnx.graph import FLOAT, Graph
from edgeomni.exporters.onnx.operators import FusedOperators
from edgeomni.quantize.schemes import Scheme, dequantize, quantize
from edgeomni.runtimes.onnxruntime import sessions
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, optimized_ops

SCHEMES = {
    "fp32": (Scheme("fp32"), "MatMul:constant"),
    "int8_dynamic": (Scheme("int8_dynamic"), "DynamicQuantizeMatMul"),
    "int8": (Scheme("int8", 32), "MatMulNBits:bits=8:acc=4"),
    "int4": (Scheme("int4", 32), "MatMulNBits:bits=4:acc=4"),
}


def linear_graph(path: Path, scheme: Scheme) -> Path:
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    graph = Graph("linear")
    x = graph.input("x", FLOAT, [1, "t", 64])
    graph.output("y", FLOAT, [1, "t", 48], FusedOperators(graph).linear(x, "layer", quantize(weight, scheme)))
    graph.save(path)
    return path


@pytest.mark.parametrize("name", SCHEMES)
def test_optimised_graph_tells_the_kernel(name: str, tmp_path: Path) -> None:
    scheme, kernel = SCHEMES[name]
    ops = optimized_ops(linear_graph(tmp_path / "a.onnx", scheme))
    assert ops[kernel] == 1
    assert sum(n for op, n in ops.items() if op.startswith(("MatMul", "DynamicQuantize"))) == 1


def test_sessions_compute_with_the_threads_asked_for_and_do_not_spin(tmp_path: Path) -> None:
    session = SessionFactory(threads=1).open(linear_graph(tmp_path / "a.onnx", Scheme("int4", 32)))
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert session.run(["y"], {"x": np.ones((1, 3, 64), np.float32)})[0].shape == (1, 3, 48)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_exact_graphs_multiply_in_float(name: str, tmp_path: Path) -> None:
    scheme, _ = SCHEMES[name]
    path = linear_graph(tmp_path / "a.onnx", scheme)
    x = np.random.default_rng(1).standard_normal((1, 5, 64)).astype(np.float32)
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    wanted = x @ dequantize(quantize(weight, scheme)).T
    exact = SessionFactory(1, exact=[path]).open(path).run(["y"], {"x": x})[0]
    rounded = SessionFactory(1).open(path).run(["y"], {"x": x})[0]
    np.testing.assert_allclose(exact, wanted, atol=1e-4)
    assert np.abs(rounded - wanted).max() > 1e-3


@pytest.mark.parametrize(
    ("isa", "value"), [(("avx2",), "1"), (("avx2", "avx512f", "avx512_vnni"), "0"), (("neon",), "0")]
)
def test_dynamic_weights_are_made_exact_where_u8_x_s8_overflows(
    isa: tuple[str, ...], value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = linear_graph(tmp_path / "a.onnx", Scheme("int8_dynamic"))
    safe_here = not sessions._u8s8_overflows()
    monkeypatch.setattr(sessions, "detect", lambda: SimpleNamespace(isa=isa))
    sessions._u8s8_overflows.cache_clear()
    x = np.random.default_rng(1).standard_normal((1, 5, 64)).astype(np.float32)
    session = SessionFactory(1).open(path, dynamic=True)
    sessions._u8s8_overflows.cache_clear()
    assert session.get_session_options().get_session_config_entry("session.x64quantprecision") == value
    if value == "1" or safe_here:  # a machine that lacks what `isa` claims would overflow
        np.testing.assert_allclose(session.run(["y"], {"x": x})[0], in_integers(x), atol=1e-4)


def in_integers(x: np.ndarray) -> np.ndarray:
    """x [1, T, 64] times the weights of `linear_graph`, both in 8 bits and added up without overflow.

    The activations are rounded as ONNX defines DynamicQuantizeLinear.
    """
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    zero = round(-low / scale)
    ids = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - zero
    packed = quantize(np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32), Scheme("int8_dynamic"))
    return np.asarray((ids @ packed.data.astype(np.int64).T) * scale * packed.scales)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"body\.onnx is missing"):
        SessionFactory().open(tmp_path / "body.onnx")


def test_damaged_graph_is_named_and_the_cause_kept(tmp_path: Path) -> None:
    path = tmp_path / "body.onnx"
    path.write_bytes(b"this is no graph")
    with pytest.raises(EngineError, match=r"body\.onnx cannot be loaded.*edgeomni verify") as caught:
        SessionFactory().open(path)
    assert caught.value.__cause__ is not None


def test_cut_weights_are_an_engine_error(tmp_path: Path) -> None:
    path = linear_graph(tmp_path / "a.onnx", Scheme("int4", 32))
    data = tmp_path / "a.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(EngineError, match=r"a\.onnx cannot be loaded"):
        SessionFactory().open(path)


def test_cuda_is_refused_where_onnxruntime_has_none() -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        assert SessionFactory(device="cuda").device == "cuda"
        return
    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        SessionFactory(device="cuda")


def test_nonsense_is_refused() -> None:
    with pytest.raises(EngineError, match="'tpu'"):
        SessionFactory(device="tpu")
    for threads in (0, 100_000):
        with pytest.raises(UsageError, match=f"threads must be .* not {threads}"):
            SessionFactory(threads)
