"""Operations that ggml has no fast form of on the CPU, computed by numpy inside a graph (ggml_custom_4d).

ggml's threads call back with their share of the rows; numpy works through it in pieces that stay in the cache, and lets
go of Python's lock meanwhile.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.runtimes.ggml.backend import PIECE
from edgeomni.runtimes.ggml.functions import CustomCallback, Tensor
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F32 as FLOAT

Compute = Callable[[F32, list[F32], int, int, F32], None]
"""(result [rows, columns], sources, first row, last row + 1, scratch [3, PIECE]): computes these rows of the result."""
_ALL_THREADS = -1
"""GGML_N_TASKS_MAX"""
_MOST_SOURCES = 8
_WIDE = 8192
"""Values of a row of per-channel factors: short rows are taken several at once."""
_SMALLEST_ALPHA = 1e-9
"""A snake with a smaller alpha is the identity to float32's precision; dividing by it would not be."""


def custom(graph: Graph, rows: int, columns: int, sources: Sequence[int], compute: Compute) -> int:
    """A tensor [rows, columns] float32 that `compute` makes of contiguous float32 sources. On the CPU only."""
    for source in sources:
        graph.check_plain(source)
    if not graph.backend.on_cpu or len(sources) > _MOST_SOURCES or rows < 1:
        raise EngineError("numpy's operations run on the CPU, with few sources and some rows")
    known: list[tuple[F32, list[F32]]] = []

    def work(result: int, thread: int, threads: int, _: Any) -> None:
        try:
            if not known:  # where the graph's values lie is settled before its first run
                known.append((_array(result), [_array(source) for source in sources]))
            out, given = known[0]
            scratch = graph.backend.scratch(thread)
            compute(out, given, rows * thread // threads, rows * (thread + 1) // threads, scratch)
        except BaseException as exc:  # C cannot hand it on; Graph.compute raises it
            graph.failures.append(exc)

    callback = CustomCallback(work)
    graph.held.append(callback)
    pointers = (c.c_void_p * len(sources))(*sources)
    return graph.new("ggml_custom_4d", FLOAT, columns, rows, 1, 1, pointers, len(sources), callback, _ALL_THREADS, None)


def snake(
    graph: Graph, x: int, alpha: F32, bias: F32 | None, before: int | None = None, after: int = 0, *, exact: bool
) -> int:
    """`before` [m, channels] as it is, the snake of x [n, channels] + bias, `after` rows of zeros; see Snake."""
    n, channels = graph.shape(x)
    apply = Snake(alpha, bias, exact)
    kept = 0 if before is None else graph.shape(before)[0]

    def compute(out: F32, sources: list[F32], start: int, stop: int, scratch: F32) -> None:
        if (head := min(stop, kept)) > start:
            out[start:head] = sources[1][start:head]
        first, last = max(start, kept), min(stop, kept + n)
        if first < last:
            apply(sources[0][first - kept : last - kept], out[first:last], scratch)
        if (tail := max(start, kept + n)) < stop:
            out[tail:stop] = 0

    return custom(graph, kept + n + after, channels, [x] if before is None else [x, before], compute)


def residual(graph: Graph, y: int, x: int, before: int | None, bias: F32 | None) -> int:
    """y [n, channels] + bias + the first n rows of `before` [m, channels] followed by x."""
    n, channels = graph.shape(y)
    kept = min(n, 0 if before is None else graph.shape(before)[0])
    repeat = max(1, _WIDE // channels)
    wide = None if bias is None else np.tile(bias, repeat).astype(np.float32)

    def add(out: F32, a: F32, b: F32, scratch: F32) -> None:
        for start, stop, columns in _pieces(len(out), channels, repeat):
            form = (-1, columns)
            into, other = out[start:stop].reshape(form), b[start:stop].reshape(form)
            if wide is not None:
                other = np.add(other, wide[:columns], out=scratch[0, : other.size].reshape(form))
            np.add(a[start:stop].reshape(form), other, out=into)

    def compute(out: F32, sources: list[F32], start: int, stop: int, scratch: F32) -> None:
        middle = min(max(kept, start), stop)
        if start < middle:
            add(out[start:middle], sources[0][start:middle], sources[2][start:middle], scratch)
        if middle < stop:
            add(out[middle:stop], sources[0][middle:stop], sources[1][middle - kept : stop - kept], scratch)

    return custom(graph, n, channels, [y, x] if before is None else [y, x, before], compute)


class Snake:
    """x + sin(alpha x)^2 / alpha of rows [n, channels] (arXiv 2006.08195), a bias added to x first.

    sin(pi u)^2 = s (C0 + C1 s + ...) with s = (u - round(u))^2 <= 1/4: a Chebyshev fit, whose error is 2.5e-5 with four
    terms and, for `exact`, 6e-9 with six. numpy's own sine costs more where it has no AVX-512, and as much there.
    """

    def __init__(self, alpha: F32, bias: F32 | None, exact: bool) -> None:
        self.channels, self._repeat = len(alpha), max(1, _WIDE // len(alpha))
        safe = np.where(np.abs(alpha) < _SMALLEST_ALPHA, _SMALLEST_ALPHA, alpha).astype(np.float64)
        terms = sine_squared(6 if exact else 4)
        self._turns, self._back = self._wide(safe / np.pi), self._wide(terms[-1] / safe)
        self._bias = None if bias is None else self._wide(bias)
        self._terms = [np.float32(term / terms[-1]) for term in terms[:-1]]

    def __call__(self, x: F32, out: F32, scratch: F32) -> None:
        """Contiguous x [n, channels] -> out [n, channels]; scratch [3, PIECE]."""
        for start, stop, columns in _pieces(len(x), self.channels, self._repeat):
            form = (-1, columns)
            spare = [row[: (stop - start) * self.channels].reshape(form) for row in scratch]
            self._piece(x[start:stop].reshape(form), out[start:stop].reshape(form), spare)

    def _piece(self, x: F32, out: F32, spare: list[F32]) -> None:
        (u, y, biased), width = spare, x.shape[1]
        add, subtract, multiply = np.add, np.subtract, np.multiply
        if self._bias is not None:
            x = add(x, self._bias[:width], biased)
        multiply(x, self._turns[:width], u)
        np.rint(u, y)
        subtract(u, y, u)
        multiply(u, u, u)
        add(u, self._terms[-1], y)
        for term in reversed(self._terms[:-1]):
            multiply(y, u, y)
            add(y, term, y)
        multiply(y, u, y)
        multiply(y, self._back[:width], y)
        add(x, y, out)

    def _wide(self, values: NDArray[Any]) -> F32:
        return np.tile(values, self._repeat).astype(np.float32)


def sine_squared(terms: int) -> NDArray[np.float64]:
    """C with sin(pi u)^2 = s (C0 + C1 s + ..), s = u^2 in [0, 1/4]: fitted at Chebyshev's nodes."""
    nodes = (1 + np.cos(np.pi * (np.arange(4 * terms) + 0.5) / (4 * terms))) / 8
    values = np.sin(np.pi * np.sqrt(nodes)) ** 2 / nodes
    fit = np.polynomial.Polynomial.fit(nodes, values, terms - 1, w=nodes)
    return np.asarray(fit.convert().coef)


def _pieces(rows: int, channels: int, repeat: int) -> Iterator[tuple[int, int, int]]:
    """(first row, last row + 1, columns when `repeat` rows, or the few that are left, are read as one)."""
    step = max(1, PIECE // (channels * repeat)) * repeat
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        whole = start + (stop - start) // repeat * repeat
        if whole > start:
            yield start, whole, repeat * channels
        if stop > whole:
            yield whole, stop, (stop - whole) * channels


def _array(tensor: int) -> F32:
    """The values of an allocated contiguous float32 tensor [rows, columns], where they lie."""
    of = Tensor.from_address(tensor)
    values = (c.c_float * (of.ne[0] * of.ne[1] * of.ne[2] * of.ne[3])).from_address(of.data)
    return np.frombuffer(values, np.float32).reshape(-1, of.ne[0])
