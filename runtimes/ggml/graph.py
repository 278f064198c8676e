"""One ggml graph: built once, then run as often as wanted, with inputs and outputs copied from and to numpy."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.errors import EngineError
from edgeomni.runtimes.ggml.library import InitParams, Tensor, library

F32, I32 = 0, 26
"""enum ggml_type."""
_DTYPES = {F32: np.dtype(np.float32), I32: np.dtype(np.int32)}
_NODES = 256


class Graph:
    """Tensors are ints (struct ggml_tensor *); shapes are numpy's, so that the last dimension is the fastest.

    Raises EngineError for shapes that do not fit, before ggml, which would end the process, sees them.
    """

    def __init__(self, threads: int) -> None:
        self._ggml = g = library()
        memory = g.ggml_tensor_overhead() * _NODES + g.ggml_graph_overhead_custom(_NODES, False)
        self._context = g.ggml_init(InitParams(memory, None, True))
        self._graph = g.ggml_new_graph_custom(self._context, _NODES, False)
        self._backend = g.ggml_backend_cpu_init()
        g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._allocator, self._lock = None, Lock()

    def input(self, dtype: int, rows: int, columns: int) -> int:
        tensor: int = self._ggml.ggml_new_tensor_2d(self._context, dtype, columns, rows)
        self._ggml.ggml_set_input(tensor)
        return tensor

    def ids(self, count: int) -> int:
        tensor: int = self._ggml.ggml_new_tensor_1d(self._context, I32, count)
        self._ggml.ggml_set_input(tensor)
        return tensor

    def linear(self, weight: int, x: int) -> int:
        """weight [n, k] of any type, x [t, k] float32 -> [t, n] float32."""
        inner = [self._of(tensor).ne[0] for tensor in (weight, x)]
        if inner[0] != inner[1] or self._of(x).type != F32:
            raise EngineError(f"a product of rows of {inner[0]} with inputs of {inner[1]} was asked for")
        return int(self._ggml.ggml_mul_mat(self._context, weight, x))

    def rows(self, table: int, ids: int) -> int:
        """table [n, k] of any type, ids int32 [t] -> [t, k] float32. The caller checks that 0 <= id < n."""
        return int(self._ggml.ggml_get_rows(self._context, table, ids))

    def output(self, tensor: int) -> None:
        self._ggml.ggml_set_output(tensor)
        self._ggml.ggml_build_forward_expand(self._graph, tensor)

    def ready(self) -> None:
        """Allocates what lies between inputs and outputs; nothing can be added afterwards."""
        self._allocator = self._ggml.ggml_gallocr_new(self._ggml.ggml_backend_cpu_buffer_type())
        if not self._ggml.ggml_gallocr_alloc_graph(self._allocator, self._graph):
            raise EngineError("ggml cannot allocate a graph; check that memory is left")

    def run(self, given: dict[int, NDArray[Any]], output: int) -> NDArray[np.float32]:
        """Sets the inputs, computes, and returns a copy of an output [rows, columns]. One thread at a time may."""
        with self._lock:
            for tensor, array in given.items():
                self._set(tensor, array)
            if status := self._ggml.ggml_backend_graph_compute(self._backend, self._graph):
                raise EngineError(f"ggml could not compute (status {status}); check that memory is left")
            ne = self._of(output).ne
            out = np.empty((ne[1], ne[0]), np.float32)
            self._ggml.ggml_backend_tensor_get(output, out.ctypes.data, 0, out.nbytes)
            return out

    def set_threads(self, threads: int) -> None:
        """How many threads compute from the next run on."""
        self._ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def close(self) -> None:
        """Gives back what ggml holds."""
        if self._context:
            if self._allocator:
                self._ggml.ggml_gallocr_free(self._allocator)
            self._ggml.ggml_backend_free(self._backend)
            self._ggml.ggml_free(self._context)
            self._context = self._allocator = None

    def _set(self, tensor: int, array: NDArray[Any]) -> None:
        to = self._of(tensor)
        array = np.ascontiguousarray(array, _DTYPES[to.type])
        if array.nbytes != self._ggml.ggml_nbytes(tensor):
            raise EngineError(f"an input has {array.nbytes} bytes, not {self._ggml.ggml_nbytes(tensor)}")
        self._ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def _of(self, tensor: int) -> Tensor:
        return Tensor.from_address(tensor)
