"""The layer over ggml's C interface: what operations compute against numpy, what is refused before ggml would end."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.runtimes.ggml import functions, library, numpy_operations
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F16
from edgeomni.runtimes.ggml.library import F32 as FLOAT

Build = Callable[..., int]


def values(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def computed(build: Build, *arrays: F32, threads: int = 1, nodes: int = 256) -> F32:
    """What a graph of `build(graph, tensors...)` gives for these arrays [rows, columns]."""
    graph = Graph(threads, nodes=nodes)
    inputs = [graph.input(FLOAT, *array.shape) for array in arrays]
    output = build(graph, *inputs)
    graph.output(output)
    graph.ready()
    try:
        return graph.run(dict(zip(inputs, arrays, strict=True)), output)
    finally:
        graph.close()


# --- values


def test_products_sums_and_norms_are_numpys() -> None:
    w, x, bias = values(6, 8), values(5, 8, seed=1), values(1, 6, seed=2)
    assert_allclose(computed(lambda g, w, x, b: g.linear(w, x, b), w, x, bias), x @ w.T + bias, atol=1e-5)
    gain, shift = values(1, 8, seed=3), values(1, 8, seed=4)
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert_allclose(computed(lambda g, *t: g.norm(*t, 1e-5), x, gain, shift), normal * gain + shift, atol=1e-5)
    assert_array_equal(computed(lambda g, x: g.scaled(x, -1.0), x), -x)


def test_activations_are_numpys() -> None:
    x, y = values(3, 40), values(3, 40, seed=1)
    erf = np.vectorize(math.erf)(x / math.sqrt(2))
    tables = {"gelu_erf": (x / 2 * (1 + erf), 1e-6), "gelu": (x / 2 * (1 + erf), 3e-3)}
    tables |= {"tanh": (np.tanh(x), 1e-6), "elu": (np.where(x > 0, x, np.expm1(x)), 1e-6), "sin": (np.sin(x), 1e-6)}
    for name, (expected, near) in tables.items():
        assert_allclose(computed(lambda g, x, n=name: g.unary(n, x), x), expected, atol=near, err_msg=name)
    assert_allclose(computed(lambda g, a, b: g.swiglu(a, b), x, y), x / (1 + np.exp(-x)) * y, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_attention_is_softmax_of_products(half: bool) -> None:
    heads, t, m, n = 2, 5, 7, 8
    q, k, v = values(t, heads * n), values(m, heads * n, seed=1), values(m, heads * n, seed=2)

    def build(g: Graph, *parts: int) -> int:
        split = [g.permuted(g.reshaped(p, 1, g.shape(p)[0], heads, n), 0, 2, 1, 3) for p in parts]
        k, v = (g.cast(p, F16) if half else p for p in split[1:])
        return g.attention(split[0], k, v, 0.25)

    expected = np.zeros_like(q)
    for h in range(heads):
        at = slice(h * n, (h + 1) * n)
        scores = np.exp(0.25 * q[:, at] @ k[:, at].T)
        expected[:, at] = scores / scores.sum(1, keepdims=True) @ v[:, at]
    assert_allclose(computed(build, q, k, v), expected, atol=3e-3 if half else 1e-5)


def test_forms_are_numpys() -> None:
    x = values(9, 6)
    assert_array_equal(computed(lambda g, x: g.contiguous(g.cut(x, 2, 7)), x), x[2:7])
    assert_array_equal(computed(lambda g, x: g.contiguous(g.columns(x, 1, 4)), x), x[:, 1:4])
    windows = np.stack([x[i : i + 3].reshape(-1) for i in range(0, 7, 2)])
    assert_array_equal(computed(lambda g, x: g.contiguous(g.windows(x, 3, step=2)), x), windows)
    for axis in (0, 1):
        assert_array_equal(computed(lambda g, x, a=axis: g.joined(x, x, axis=a), x), np.concatenate([x, x], axis))
    permuted = computed(lambda g, x: g.contiguous(g.permuted(g.reshaped(x, 1, 9, 2, 3), 0, 2, 3, 1)), x)
    assert_array_equal(permuted.reshape(2, 3, 9), x.reshape(9, 2, 3).transpose(1, 2, 0))
    repeated = computed(lambda g, x: g.repeated(g.reshaped(x, 9, 1, 6), 9, 2, 6), x)
    assert_array_equal(repeated.reshape(9, 2, 6), np.repeat(x[:, None], 2, 1))


@pytest.mark.parametrize(("taps", "dilation", "channels"), [(7, 1, 8), (7, 9, 5), (2, 3, 64), (3, 1, 3)])
def test_depthwise_convolutions_are_sums_of_shifted_rows(taps: int, dilation: int, channels: int) -> None:
    x, kernel = values(70, channels), values(taps, channels, seed=1)
    n = 70 - (taps - 1) * dilation
    expected = sum(x[i * dilation : i * dilation + n] * kernel[i] for i in range(taps))
    assert_allclose(computed(lambda g, k, x: g.depthwise(k, x, dilation), kernel, x), expected, atol=1e-5)
    least = x[: (taps - 1) * dilation + 1]
    one = (least[::dilation] * kernel).sum(0, keepdims=True)
    assert_allclose(computed(lambda g, k, x: g.depthwise(k, x, dilation), kernel, least), one, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "channels"), [(1, 1), (50, 3), (600, 64), (3, 9000), (1029, 200)])
def test_snakes_are_numpys(n: int, channels: int, threads: int) -> None:
    x, before = values(n, channels) * 4, values(2, channels, seed=1)
    alpha, bias = values(1, channels, seed=2)[0] * 2, values(1, channels, seed=3)[0]
    y = (x + bias).astype(np.float64)
    expected = np.concatenate([before, y + np.sin(alpha * y) ** 2 / alpha, np.zeros((3, channels))])
    for exact, near in ((True, 2e-6), (False, 4e-5)):
        got = computed(
            lambda g, x, b, e=exact: numpy_operations.snake(g, x, alpha, bias, b, 3, exact=e),
            x,
            before,
            threads=threads,
        )
        assert (np.abs(got - expected) <= near * (1 + 1 / np.abs(alpha))).all()
    plain = computed(lambda g, x: numpy_operations.snake(g, x, alpha, None, exact=True), x, threads=threads)
    assert_allclose(plain, x + np.sin(alpha * x.astype(np.float64)) ** 2 / alpha, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "kept", "channels"), [(5, 2, 4), (5, 0, 4), (3, 6, 4), (700, 27, 64)])
def test_residuals_are_delayed_sums(n: int, kept: int, channels: int, threads: int) -> None:
    y, x, bias = values(n, channels), values(n, channels, seed=1), values(1, channels, seed=2)[0]
    before = values(kept, channels, seed=3)
    arrays = [y, x, *([before] if kept else [])]

    def build(g: Graph, y: int, x: int, b: int | None = None, shift: F32 | None = bias) -> int:
        return numpy_operations.residual(g, y, x, b, shift)

    expected = y + np.concatenate([before, x])[:n]
    assert_allclose(computed(build, *arrays, threads=threads), expected + bias, atol=1e-6)
    got = computed(lambda g, y, x, b=None: build(g, y, x, b, None), *arrays, threads=threads)
    assert_allclose(got, expected, atol=1e-6)


def test_an_activation_s_polynomial_is_as_near_as_it_says() -> None:
    u = np.linspace(-0.5, 0.5, 10001)
    for terms, near in ((4, 2.5e-5), (6, 7e-9)):
        fit = np.polynomial.polynomial.polyval(u * u, numpy_operations.sine_squared(terms)) * u * u
        assert near / 3 < np.abs(fit - np.sin(np.pi * u) ** 2).max() < near


# --- what is refused


def refuse(build: Build, *arrays: F32) -> None:
    graph = Graph(1)
    inputs = [graph.input(FLOAT, *array.shape) for array in arrays]
    with pytest.raises(EngineError):
        build(graph, *inputs)
    graph.close()


REFUSED: list[tuple[Build, list[tuple[int, int]]]] = [
    (lambda g, w, x: g.linear(w, x), [(3, 4), (2, 5)]),
    (lambda g, w, x: g.linear(g.permuted(w, 0, 1, 3, 2), x), [(4, 4), (2, 4)]),
    (lambda g, w, x: g.linear(w, g.permuted(x, 0, 1, 3, 2)), [(3, 4), (4, 2)]),
    (lambda g, x, y: g.add(x, y), [(3, 4), (2, 4)]),
    (lambda g, x, y: g.mul(x, y), [(3, 4), (3, 3)]),
    (lambda g, x: g.add(g.cast(x, F16), x), [(3, 4)]),
    (lambda g, x: g.add(x, g.cast(x, F16)), [(3, 4)]),
    (lambda g, x, w: g.norm(x, w, w, 1e-5), [(3, 4), (1, 3)]),
    (lambda g, x: g.unary("gelu", g.columns(x, 0, 2)), [(3, 4)]),
    (lambda g, x: g.norm(g.cast(x, F16), x, x, 1e-5), [(1, 4)]),
    (lambda g, x, y: g.swiglu(x, y), [(3, 4), (3, 2)]),
    (lambda g, x, m: g.softmax(x, m, 1.0), [(3, 4), (4, 4)]),
    (lambda g, q, k: g.attention(q, k, k, 1.0), [(3, 4), (3, 5)]),
    (lambda g, q, k: g.attention(q, k, q, 1.0), [(3, 4), (5, 4)]),
    (lambda g, q, k: g.attention(q, g.cast(k, F16), k, 1.0), [(3, 4), (3, 4)]),
    (lambda g, x: g.reshaped(x, 5, 2), [(3, 4)]),
    (lambda g, x: g.reshaped(g.columns(x, 0, 2), 2, 3), [(3, 4)]),
    (lambda g, x: g.permuted(x, 0, 1, 2, 2), [(3, 4)]),
    (lambda g, x: g.cut(x, 0, 4), [(3, 4)]),
    (lambda g, x: g.cut(x, 2, 2), [(3, 4)]),
    (lambda g, x: g.cut(x, -1, 2), [(3, 4)]),
    (lambda g, x: g.columns(x, 3, 5), [(3, 4)]),
    (lambda g, x: g.rows_of(x, 1, 4), [(3, 4)]),
    (lambda g, x: g.windows(x, 4), [(3, 4)]),
    (lambda g, x: g.windows(g.columns(x, 0, 2), 2), [(3, 4)]),
    (lambda g, x, y: g.joined(x, y), [(3, 4), (3, 5)]),
    (lambda g, x, y: g.joined(x, y, axis=1), [(3, 4), (2, 4)]),
    (lambda g, x: g.joined(x, g.cast(x, F16)), [(3, 4)]),
    (lambda g, x: g.repeated(x, 4, 4), [(3, 4)]),
    (lambda g, k, x: g.depthwise(k, x, 1), [(7, 4), (6, 4)]),
    (lambda g, k, x: g.depthwise(k, x, 1), [(2, 3), (6, 4)]),
    (lambda g, k, x: g.depthwise(k, x, 1), [(2, 2), (6, 2)]),
    (lambda g, x: g.rows(x, x), [(3, 4)]),
    (lambda g, x: numpy_operations.snake(g, g.columns(x, 0, 2), np.ones(2, np.float32), None, exact=True), [(3, 4)]),
    (lambda g, x: g.input(FLOAT, 0, 4), [(3, 4)]),
    (lambda g, x: g.input(FLOAT, 1 << 20, 1 << 20), [(3, 4)]),
    (lambda g, x: [g.add(x, x) for _ in range(400)][0], [(3, 4)]),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_ggml_would_end_the_process_for_is_refused(case: int) -> None:
    build, shapes = REFUSED[case]
    refuse(build, *(values(*shape) for shape in shapes))


def doubling() -> tuple[Graph, int, int]:
    graph = Graph(1)
    x = graph.input(FLOAT, 3, 4)
    y = graph.add(x, x)
    graph.output(y)
    return graph, x, y


def test_a_graph_runs_when_it_is_ready_and_until_it_is_closed() -> None:
    graph, x, y = doubling()
    with pytest.raises(EngineError, match="not ready"):
        graph.run({x: values(3, 4)}, y)
    graph.ready()
    assert graph.buffer_bytes > 0
    with pytest.raises(EngineError, match="nothing can be added"):
        graph.add(x, y)
    for seed in (0, 1):
        assert_array_equal(graph.run({x: values(3, 4, seed=seed)}, y), 2 * values(3, 4, seed=seed))
    with pytest.raises(EngineError, match="an input has 32 bytes, not 48"):
        graph.run({x: values(2, 4)}, y)
    graph.close()
    graph.close()
    with pytest.raises(EngineError, match="closed"):
        graph.run({x: values(3, 4)}, y)


def test_our_own_operations_errors_reach_the_caller_and_the_graph_goes_on() -> None:
    graph, broken = Graph(1), [True]
    x = graph.input(FLOAT, 3, 4)

    def compute(out: F32, sources: list[F32], start: int, stop: int, scratch: F32) -> None:
        if broken[0]:
            raise ZeroDivisionError("for a test")
        out[start:stop] = sources[0][start:stop]

    y = numpy_operations.custom(graph, 3, 4, [x], compute)
    graph.output(y)
    graph.ready()
    with pytest.raises(EngineError, match="for a test"):
        graph.run({x: values(3, 4)}, y)
    broken[0] = False
    assert_array_equal(graph.run({x: values(3, 4)}, y), values(3, 4))


def test_an_interrupt_ends_a_run_after_the_operation_at_work() -> None:
    graph, interrupt, seen = Graph(1), Interrupt(), list[int]()
    x = graph.input(FLOAT, 1, 4)

    def step(i: int) -> numpy_operations.Compute:
        def compute(out: F32, sources: list[F32], start: int, stop: int, scratch: F32) -> None:
            seen.append(i)
            out[start:stop] = sources[0][start:stop] + 1
            if i == 2 and len(seen) < 4:
                interrupt.set()

        return compute

    y = x
    for i in range(6):
        y = numpy_operations.custom(graph, 1, 4, [y], step(i))
    graph.output(y)
    graph.ready()
    with pytest.raises(Interrupted):
        graph.compute({x: values(1, 4)}, [y], interrupt)
    assert seen == [0, 1, 2]
    with pytest.raises(Interrupted):  # before anything runs
        graph.compute({x: values(1, 4)}, [y], interrupt)
    assert seen == [0, 1, 2]
    assert_allclose(graph.compute({x: values(1, 4)}, [y], Interrupt())[0], values(1, 4) + 6, atol=1e-5)


def test_what_is_dropped_without_being_closed_is_given_back() -> None:
    graph, *rest = doubling()
    graph.ready()
    finalizers = graph._freed, graph.backend._freed
    del graph, rest
    gc.collect()
    assert [finalizer.alive for finalizer in finalizers] == [False, False]


def test_no_gpu_is_said_with_what_to_build() -> None:
    library.library().ggml_backend_load_all()
    if library.library().ggml_backend_dev_by_type(library.GPU):
        pytest.skip("this build of ggml has a GPU")
    with pytest.raises(EngineError, match="no GPU backend.*GGML_CUDA"):
        Backend(1, "cuda")


# --- the library itself


def with_declaration(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(library, name, value)
    library.library.cache_clear()


def test_another_layout_of_tensors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(functions.Tensor):
        _fields_ = [("more", ctypes.c_int64)]

    class Swapped(ctypes.Structure):
        _fields_ = [functions.Tensor._fields_[i] for i in (0, 1, 3, 2, *range(4, 14))]

    for tensor, message in ((Longer, "tensors of 336 bytes"), (Swapped, "tensors with other fields")):
        with_declaration(monkeypatch, "Tensor", tensor)
        with pytest.raises(EngineError, match=message):
            library.library()
    monkeypatch.undo()
    library.library.cache_clear()
    library.library()


def test_missing_functions_types_and_files_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with_declaration(monkeypatch, "CPU", {"ggml_of_the_future": (None,)})
    with pytest.raises(EngineError, match="has no ggml_of_the_future; update it"):
        library.library()
    monkeypatch.undo()
    with_declaration(monkeypatch, "TYPES", {"Q4_0": 3})
    with pytest.raises(EngineError, match="another type 3 than Q4_0"):
        library.library()
    monkeypatch.undo()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    library.library.cache_clear()
    with pytest.raises(EngineError, match="holds none of libggml-base.so"):
        library.library()
    (tmp_path / "libggml-base.so").write_bytes(b"no library")
    with pytest.raises(EngineError, match="cannot be loaded"):
        library.library()
    monkeypatch.undo()
    library.library.cache_clear()
    assert library.version().count(".") == 2
