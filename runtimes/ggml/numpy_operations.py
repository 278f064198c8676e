"""Operations that ggml has no fast form of on the CPU, computed by numpy inside a graph (ggml_custom_4d).

ggml's threads call back with their share of the rows; numpy works through it in pieces that stay in the cache, and lets
go of Python's lock meanwhile.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.runtimes.ggml.functions import CustomCallback, Tensor
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F32 as FLOAT

Compute = Callable[[F32, list[F32], int, int], None]
"""(result [rows, columns], sources, first row, last row + 1): computes these rows of the result."""
_ALL_THREADS = -1
"""GGML_N_TASKS_MAX"""
_MOST_SOURCES = 8
_PIECE = 8192
"""Values worked on at once: with what belongs to them they stay in a core's second cache."""
_WIDE = 2048
"""Values of a row of per-channel factors: short rows are taken several at once."""


def custom(graph: Graph, rows: int, columns: int, sources: Sequence[int], compute: Compute) -> int:
    """A tensor [rows, columns] float32 that `compute` makes of contiguous float32 sources. On the CPU only."""
    for source in sources:
        graph._contiguous(source), graph._float(source)
    if not graph.backend.on_cpu or len(sources) > _MOST_SOURCES:
        raise EngineError("numpy's operations run on the CPU, with few sources")
    known: list[Any] = []

    def work(result: int, thread: int, threads: int, _: Any) -> None:
        try:
            if not known:  # where the graph's values lie is settled before its first run
                known.append((_array(result), [_array(source) for source in sources]))
            out, given = known[0]
            compute(out, given, rows * thread // threads, rows * (thread + 1) // threads)
        except BaseException as exc:  # C cannot hand it on; Graph.compute raises it
            graph._failures.append(exc)

    callback = CustomCallback(work)
    graph._held.append(callback)
    pointers = (c.c_void_p * len(sources))(*sources)
    return graph._new(
        "ggml_custom_4d", FLOAT, columns, rows, 1, 1, pointers, len(sources), callback, _ALL_THREADS, None
    )


def _array(tensor: int) -> F32:
    """The values of an allocated contiguous float32 tensor [rows, columns], where they lie."""
    of = Tensor.from_address(tensor)
    values = (c.c_float * (of.ne[0] * of.ne[1] * of.ne[2] * of.ne[3])).from_address(of.data)
    return np.frombuffer(values, np.float32).reshape(-1, of.ne[0])


class Snake:
    """x + sin(alpha x)^2 / alpha of rows [n, channels] (arXiv 2006.08195), a bias added to x first.

    sin(pi u)^2 = s (C0 + C1 s + ...) with s = (u - round(u))^2 <= 1/4: a Chebyshev fit, whose error is 5e-7 with five
    terms and 1e-8 with six. It is half of what numpy's sine costs on a processor without AVX-512.
    """

    def __init__(self, alpha: F32, bias: F32 | None, exact: bool) -> None:
        self.channels = len(alpha)
        alpha = np.where(np.abs(alpha) < 1e-9, 1e-9, alpha).astype(np.float64)  # smaller ones are the identity
        terms = _sine_squared(6 if exact else 5)
        self._repeat = max(1, _WIDE // self.channels)
        self._turns, self._back = self._wide(alpha / np.pi), self._wide(terms[-1] / alpha)
        self._bias = None if bias is None else self._wide(bias)
        self._terms = [np.float32(term / terms[-1]) for term in terms[:-1]]

    def __call__(self, x: F32, out: F32) -> None:
        """Contiguous x [n, channels] -> out [n, channels]."""
        step = max(1, _PIECE // (self.channels * self._repeat)) * self._repeat
        for start in range(0, len(x), step):
            stop = min(start + step, len(x))
            whole = start + (stop - start) // self._repeat * self._repeat
            if whole > start:
                self._piece(x[start:whole].reshape(-1, self._repeat * self.channels), out[start:whole])
            if stop > whole:
                self._piece(x[whole:stop].reshape(1, -1), out[whole:stop])

    def _piece(self, x: F32, out: F32) -> None:
        width = x.shape[1]
        out = out.reshape(x.shape)
        if self._bias is not None:
            x = np.add(x, self._bias[:width])
        u = np.multiply(x, self._turns[:width])
        y = np.add(u, _ROUND)
        np.subtract(y, _ROUND, out=y)
        np.subtract(u, y, out=u)
        np.multiply(u, u, out=u)
        np.add(u, self._terms[-1], out=y)
        for term in reversed(self._terms[:-1]):
            np.multiply(y, u, out=y)
            np.add(y, term, out=y)
        np.multiply(y, u, out=y)
        np.multiply(y, self._back[:width], out=y)
        np.add(x, y, out=out)

    def _wide(self, values: NDArray[Any]) -> F32:
        return np.tile(values, self._repeat).astype(np.float32)


_ROUND = np.float32(1.5 * 2.0**23)
"""Adding and subtracting it rounds a float32 below 2^22 to a whole number, faster than rint does."""


def _sine_squared(terms: int) -> NDArray[np.float64]:
    """C with sin(pi u)^2 = s (C0 + C1 s + ..), s = u^2 in [0, 1/4]: interpolated at Chebyshev's nodes."""
    nodes = (1 + np.cos(np.pi * (np.arange(4 * terms) + 0.5) / (4 * terms))) / 8
    values = np.sin(np.pi * np.sqrt(nodes)) ** 2 / nodes
    fit = np.polynomial.Polynomial.fit(nodes, values, terms - 1, w=nodes)
    return np.asarray(fit.convert().coef)


def snake(graph: Graph, x: int, alpha: F32, bias: F32 | None, before: int | None, *, exact: bool) -> int:
    """Snake of x [n, channels], after the rows `before` [m, channels] as they are: [m + n, channels]."""
    n, channels = graph.shape(x)
    apply = Snake(alpha, bias, exact)
    kept = 0 if before is None else graph.shape(before)[0]

    def compute(out: F32, sources: list[F32], start: int, stop: int) -> None:
        if start < kept:
            out[start : min(stop, kept)] = sources[1][start : min(stop, kept)]
        first = max(start, kept)
        if first < stop:
            apply(sources[0][first - kept : stop - kept], out[first:stop])

    return custom(graph, kept + n, channels, [x] if before is None else [x, before], compute)


def residual(graph: Graph, y: int, x: int, before: int | None, bias: F32 | None) -> int:
    """y [n, channels] + bias + the first n rows of `before` [m, channels] followed by x."""
    n, channels = graph.shape(y)
    kept = 0 if before is None else graph.shape(before)[0]
    step = max(1, _PIECE // channels)

    def compute(out: F32, sources: list[F32], start: int, stop: int) -> None:
        head = min(max(kept, start), stop)
        if start < head:
            np.add(sources[0][start:head], sources[2][start:head], out=out[start:head])
        for at in range(head, stop, step):
            end = min(at + step, stop)
            np.add(sources[0][at:end], sources[1][at - kept : end - kept], out=out[at:end])
        if bias is not None:
            for at in range(start, stop, step):
                np.add(out[at : at + step][: stop - at], bias, out=out[at : at + step][: stop - at])

    return custom(graph, n, channels, [y, x] if before is None else [y, x, before], compute)
