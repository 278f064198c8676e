"""One ggml graph: built once, then run as often as wanted, with inputs and outputs copied from and to numpy.

What it is built of is told in operations.py and, for what ggml has no fast operation for, in numpy_operations.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32 as Array
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.functions import AbortCallback, InitParams
from edgeomni.runtimes.ggml.library import ABORTED, F32, I32, library
from edgeomni.runtimes.ggml.operations import Operations

_DTYPES = {F32: np.dtype(np.float32), I32: np.dtype(np.int32)}
_MOST_ELEMENTS = 1 << 31
_NO_ABORT = AbortCallback()


class Graph(Operations):
    """A graph of at most `nodes` tensors on `backend`, or on the CPU with `threads`."""

    def __init__(self, threads: int | None = None, backend: Backend | None = None, nodes: int = 256) -> None:
        self._ggml = g = library()
        self.backend = backend or Backend(threads)
        self._most, self._made = nodes, 0
        memory = g.ggml_tensor_overhead() * nodes + g.ggml_graph_overhead_custom(nodes, False)
        self._context = g.ggml_init(InitParams(memory, None, True))
        if not self._context:
            raise EngineError("ggml cannot allocate a graph; check that memory is left")
        self._graph = g.ggml_new_graph_custom(self._context, nodes, False)
        self._lock = Lock()
        self.held: list[Any] = []
        """Callbacks, which must outlive the graph."""
        self.failures: list[BaseException] = []
        self._allocators: list[int] = []
        self._freed = weakref.finalize(self, _free, g, self._context, self._allocators)
        self._freed.atexit = False

    # --- inputs, outputs, running

    def input(self, dtype: int, rows: int, columns: int) -> int:
        """A tensor [rows, columns] that `run` is given."""
        if not 0 < rows * columns < _MOST_ELEMENTS:
            raise EngineError(f"a graph's input of {rows} x {columns} was asked for")
        tensor = self.new("ggml_new_tensor_2d", dtype, columns, rows)
        self._ggml.ggml_set_input(tensor)
        return tensor

    def ids(self, count: int) -> int:
        """An int32 tensor [count] that `run` is given."""
        tensor = self.new("ggml_new_tensor_1d", I32, count)
        self._ggml.ggml_set_input(tensor)
        return tensor

    def output(self, tensor: int) -> None:
        """Keeps what `tensor` holds, so that it can be read after a run; so do all that are told before `ready`."""
        self._ggml.ggml_set_output(tensor)
        if root := self._of(tensor).view_src:
            self._ggml.ggml_set_output(root)
        self._ggml.ggml_build_forward_expand(self._graph, tensor)

    def ready(self) -> None:
        """Allocates what lies between inputs and outputs; nothing can be added afterwards.

        Raises EngineError that names an operation which the backend does not have.
        """
        g = self._ggml
        for i in range(g.ggml_graph_n_nodes(self._graph)):
            node = g.ggml_graph_node(self._graph, i)
            if not self.backend.on_cpu and not g.ggml_backend_supports_op(self.backend.handle, node):
                what = g.ggml_op_desc(node).decode("ascii", "replace")
                raise EngineError(f"this GPU backend of ggml has no {what} as it is needed here; run on the CPU")
        self._allocators.append(g.ggml_gallocr_new(self.backend.buffer_type))
        if not g.ggml_gallocr_alloc_graph(self._allocators[0], self._graph):
            raise EngineError("ggml cannot allocate a graph; check that memory is left")

    @property
    def buffer_bytes(self) -> int:
        """What the graph's values take, once it is ready."""
        return int(self._ggml.ggml_gallocr_get_buffer_size(self._allocators[0], 0))

    def run(self, given: Mapping[int, NDArray[Any]], output: int) -> Array:
        """`compute` with one output."""
        return self.compute(given, [output])[0]

    def compute(
        self, given: Mapping[int, NDArray[Any]], outputs: Sequence[int], interrupt: Interrupt | None = None
    ) -> list[Array]:
        """Sets all inputs, computes, and returns copies of outputs [rows, columns]. Threads take turns.

        Raises Interrupted where `interrupt` was set before the end (on the CPU after the node at work), EngineError
        where ggml or one of our own operations failed, or for inputs of other sizes.
        """
        with self._lock:
            if not self._freed.alive or not self._allocators:
                raise EngineError("this graph is closed or not ready; open the component again")
            for tensor, array in given.items():
                self._set(tensor, array)
            self._computed(interrupt)
            return [self._get(tensor) for tensor in outputs]

    def set_threads(self, threads: int) -> None:
        """How many threads compute from the next run on."""
        with self._lock:
            self.backend.set_threads(threads)

    def close(self) -> None:
        """Gives back what ggml holds; a run under way ends first."""
        with self._lock:
            self._freed()

    # --- inside

    def _check_open(self) -> None:
        if self._allocators or not self._freed.alive:
            raise EngineError("nothing can be added to a graph that is ready")

    def _computed(self, interrupt: Interrupt | None) -> None:
        g, handle = self._ggml, self.backend.handle
        watching = self._watching(interrupt) if interrupt is not None and self.backend.on_cpu else nullcontext()
        if interrupt is not None:
            interrupt.check()
        with watching:
            status = g.ggml_backend_graph_compute(handle, self._graph)
        if interrupt is not None:
            interrupt.check()
        if self.failures:
            failure = self.failures[0]
            self.failures.clear()
            raise EngineError(f"one of our own operations failed in a graph ({failure})") from failure
        if status:
            raise Interrupted if status == ABORTED else EngineError(f"ggml could not compute (status {status})")

    def _watching(self, interrupt: Interrupt) -> Any:
        return _Watching(self._ggml, self.backend.handle, interrupt)

    def _set(self, tensor: int, array: NDArray[Any]) -> None:
        to = self._of(tensor)
        array = np.ascontiguousarray(array, _DTYPES[to.type])
        if array.nbytes != self._ggml.ggml_nbytes(tensor):
            raise EngineError(f"an input has {array.nbytes} bytes, not {self._ggml.ggml_nbytes(tensor)}")
        self._ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def _get(self, tensor: int) -> Array:
        if not self.is_contiguous(tensor) or self._of(tensor).type != F32:
            raise EngineError("an output must be contiguous float32")
        out = np.empty(self.shape(tensor), np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
        return out


class _Watching:
    """While it lasts, the backend ends a run after the node at work once the interrupt is set."""

    def __init__(self, ggml: Any, handle: int, interrupt: Interrupt) -> None:
        self._ggml, self._handle = ggml, handle
        self._asked = AbortCallback(lambda _: interrupt.is_set())

    def __enter__(self) -> None:
        self._ggml.ggml_backend_cpu_set_abort_callback(self._handle, self._asked, None)

    def __exit__(self, *_: object) -> None:
        self._ggml.ggml_backend_cpu_set_abort_callback(self._handle, _NO_ABORT, None)


def _free(ggml: Any, context: int, allocators: list[int]) -> None:
    for allocator in allocators:
        ggml.ggml_gallocr_free(allocator)
    ggml.ggml_free(context)
