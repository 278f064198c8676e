"""A strict recorder in the place of cuda.bindings.runtime, for tests on machines without a GPU.

It does not answer what a test expects: "device" and pinned memory are real memory, copies copy, and engines
(tensorrt_recorder.py) compute their ONNX graph. Like CUDA's, its stream runs later than it is called: what is enqueued
waits for the next synchronization, so that reading a result too early, or writing into a buffer that a waiting copy
still reads, gives wrong numbers. Unlike CUDA it refuses, with ProtocolError, every call that breaks the rules:
addresses outside live memory of the right side, sizes that leave it, frees of what is not there or still in use, calls
that a capture forbids, objects used after their end. `leaks` names what was not given back. New memory is full of NaN.
"""

from __future__ import annotations

import enum
import itertools
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ALIGNMENT = 256


class ProtocolError(AssertionError):
    """A call that CUDA or TensorRT forbids, or leaves undefined. No adapter translates it."""


class cudaError_t(enum.IntEnum):  # noqa: N801
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):  # noqa: N801
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):  # noqa: N801
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


@dataclass(eq=False)
class Memory:
    """One allocation, kept after its end so that its addresses are never given out again."""

    side: str
    address: int
    size: int
    raw: NDArray[np.uint8]
    alive: bool = True


@dataclass(eq=False)
class Operation:
    """Work in a stream. `check` looks once more whether its memory is still there when it runs."""

    name: str
    check: Callable[[], object]
    run: Callable[[], object]


@dataclass(eq=False)
class Handle:
    """A stream, a graph or an executable graph."""

    kind: str
    number: int
    alive: bool = True
    operations: list[Operation] = field(default_factory=list)
    capturing: Handle | None = None

    def __int__(self) -> int:
        return self.number


class Recorder:
    """One process's CUDA, on one device. `calls` names everything that was asked for, in order."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self, name: str = "NVIDIA Recorder", sm: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        self.name, self.sm, self.total, self.driver, self.devices = name, sm, memory, 13000, 1
        self.integrated = False
        self.calls: list[str] = []
        self.failing: dict[str, cudaError_t] = {}
        self._memory: dict[int, Memory] = {}
        self._handles: list[Handle] = []
        self._numbers = itertools.count(1)

    # --- what tests ask

    def leaks(self) -> list[str]:
        """What has not been given back, counted by kind."""
        kinds = Counter(m.side for m in self._memory.values() if m.alive)
        kinds.update(h.kind for h in self._handles if h.alive)
        return sorted(f"{count} {kind}" for kind, count in kinds.items())

    def taken(self) -> list[str]:
        """The calls since the last time, and forgets them."""
        calls, self.calls[:] = list(self.calls), []
        return calls

    def used(self) -> int:
        return sum(m.size for m in self._memory.values() if m.alive and m.side == "device")

    def module(self) -> types.ModuleType:
        """What `from cuda.bindings import runtime` gives."""
        module = types.ModuleType("cuda.bindings.runtime")
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(module, name, getattr(self, name))
        return module

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bindings, cuda = types.ModuleType("cuda.bindings"), types.ModuleType("cuda")
        bindings.runtime, cuda.bindings = self.module(), bindings  # type: ignore[attr-defined]
        for module in (cuda, bindings, bindings.runtime):  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)

    # --- what the engine recorder asks

    def span(self, address: int, size: int, side: str, what: str) -> NDArray[np.uint8]:
        """The bytes there. Raises ProtocolError unless all of them lie in one live allocation of that side."""
        for memory in self._memory.values():
            if memory.address <= address < memory.address + max(memory.size, 1):
                if not memory.alive:
                    raise ProtocolError(f"{what}: {address:#x} was freed")
                if memory.side != side:
                    raise ProtocolError(f"{what}: {address:#x} is {memory.side} memory, not {side}")
                start = address - memory.address
                if start + size > memory.size:
                    raise ProtocolError(f"{what}: {size} bytes from {start} on leave an allocation of {memory.size}")
                return memory.raw[start : start + size]
        raise ProtocolError(f"{what}: {address:#x} was never allocated")

    def enqueue(self, stream: int | Handle, operation: Operation) -> None:
        operation.check()
        handle = self._alive(stream, "stream")
        (handle.capturing or handle).operations.append(operation)

    def is_capturing(self, stream: int) -> bool:
        return self._alive(stream, "stream").capturing is not None

    def note(self, call: str) -> None:
        self.calls.append(call)

    # --- the runtime API

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._answer("cudaGetDeviceCount", self.devices)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        facts = types.SimpleNamespace(
            name=self.name.encode(), major=self.sm[0], minor=self.sm[1], integrated=int(self.integrated)
        )
        return self._answer("cudaGetDeviceProperties", facts)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._answer("cudaDriverGetVersion", self.driver)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._answer("cudaMemGetInfo", self.total - self.used(), self.total)

    def cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, b"as recorded"

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate("cudaMalloc", size, "device", self.used() + size > self.total)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate("cudaHostAlloc", size, "pinned", False)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFree", address, "device")

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFreeHost", address, "pinned")

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        def span() -> NDArray[np.uint8]:
            return self.span(address, size, "device", "cudaMemsetAsync")

        def run() -> None:
            span()[:] = value

        self.enqueue(stream, Operation("memset", span, run))
        return self._answer("cudaMemsetAsync")

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any, ...]:
        return self._copy(f"cudaMemcpyAsync {_way(kind)} {size}", target, source, [(0, size)], kind, stream)

    def cudaMemcpy2DAsync(
        self, target: int, dpitch: int, source: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> tuple[Any, ...]:
        if width > min(dpitch, spitch) or dpitch != spitch:
            raise ProtocolError(f"cudaMemcpy2DAsync: rows of {width} bytes, pitches {dpitch} and {spitch}")
        rows = [(i * dpitch, width) for i in range(height)]
        return self._copy(f"cudaMemcpy2DAsync {_way(kind)} {width}x{height}", target, source, rows, kind, stream)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._answer("cudaStreamCreateWithFlags", self._handle("stream"))

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        handle = self._alive(stream, "stream")
        if handle.operations:
            raise ProtocolError(f"the stream ends with {len(handle.operations)} operations waiting")
        handle.alive = False
        return self._answer("cudaStreamDestroy")

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        handle = self._alive(stream, "stream")
        self._not_while_capturing("cudaStreamSynchronize")
        waiting, handle.operations = handle.operations, []
        for operation in waiting:
            operation.check()
            operation.run()
        return self._answer("cudaStreamSynchronize")

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:
        handle = self._alive(stream, "stream")
        self._not_while_capturing("cudaStreamBeginCapture")
        if mode != cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            raise ProtocolError("a capture in another mode would break other threads' use of CUDA")
        handle.capturing = Handle("graph", next(self._numbers))
        return self._answer("cudaStreamBeginCapture")

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        handle = self._alive(stream, "stream")
        if (graph := handle.capturing) is None:
            raise ProtocolError("the capture that ends has not begun")
        handle.capturing = None
        if (error := self.failing.get("cudaStreamEndCapture")) is not None:
            self.note("cudaStreamEndCapture")
            return error, None
        self._handles.append(graph)
        return self._answer("cudaStreamEndCapture", graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        made = self._handle("executable graph")
        made.operations = list(self._alive(graph, "graph").operations)
        return self._answer("cudaGraphInstantiate", made)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self._end(graph, "graph")
        return self._answer("cudaGraphDestroy")

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        if any(h.operations for h in self._handles if h.kind == "stream" and h.alive):
            raise ProtocolError("an executable graph ends while the stream has work")
        self._end(executable, "executable graph")
        return self._answer("cudaGraphExecDestroy")

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> tuple[Any, ...]:
        operations = self._alive(executable, "executable graph").operations
        for operation in operations:
            self.enqueue(stream, operation)
        return self._answer(f"cudaGraphLaunch {' '.join(o.name for o in operations)}")

    # --- within

    def _answer(self, call: str, *results: Any) -> tuple[Any, ...]:
        self.note(call)
        error = self.failing.get(call.split()[0], cudaError_t.cudaSuccess)
        return (error, *results) if error == cudaError_t.cudaSuccess else (error, *(None for _ in results))

    def _allocate(self, call: str, size: int, side: str, too_much: bool) -> tuple[Any, ...]:
        self._not_while_capturing(call)
        if too_much or call in self.failing:
            self.note(f"{call} {size}")
            return self.failing.get(call, cudaError_t.cudaErrorMemoryAllocation), None
        whole = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        raw = whole[start : start + size]
        memory = Memory(side, whole.ctypes.data + start, size, raw)
        self._memory[memory.address] = memory
        return self._answer(f"{call} {size}", memory.address)

    def _free(self, call: str, address: int, side: str) -> tuple[Any, ...]:
        self._not_while_capturing(call)
        memory = self._memory.get(address)
        if memory is None or not memory.alive or memory.side != side:
            raise ProtocolError(f"{call}: {address:#x} is no live allocation of {side} memory")
        if any(h.operations for h in self._handles if h.kind == "stream" and h.alive):
            raise ProtocolError(f"{call} while the stream has work")
        memory.alive = False
        memory.raw[:] = 0xFF
        return self._answer(call)

    def _copy(
        self, call: str, target: int, source: int, rows: list[tuple[int, int]], kind: Any, stream: Any
    ) -> tuple[Any, ...]:
        sides = {1: ("device", "pinned"), 2: ("pinned", "device"), 3: ("device", "device")}
        if int(kind) not in sides:
            raise ProtocolError(f"{call}: between host arrays")
        to, where = sides[int(kind)]

        def check() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
            return [
                (self.span(target + at, size, to, call), self.span(source + at, size, where, call)) for at, size in rows
            ]

        def run() -> None:
            for into, values in check():
                if np.shares_memory(into, values):
                    raise ProtocolError(f"{call}: source and target overlap")
                into[:] = values

        self.enqueue(stream, Operation(_way(kind), check, run))
        return self._answer(call)

    def _handle(self, kind: str) -> Handle:
        handle = Handle(kind, next(self._numbers))
        self._handles.append(handle)
        return handle

    def _alive(self, wanted: Any, kind: str) -> Handle:
        for handle in self._handles:
            if (handle is wanted or (isinstance(wanted, int) and handle.number == wanted)) and handle.kind == kind:
                if handle.alive:
                    return handle
                raise ProtocolError(f"this {kind} has ended")
        raise ProtocolError(f"{wanted!r} is no {kind}")

    def _end(self, wanted: Any, kind: str) -> None:
        handle = self._alive(wanted, kind)
        handle.alive, handle.operations = False, []

    def _not_while_capturing(self, call: str) -> None:
        if any(h.capturing for h in self._handles):
            raise ProtocolError(f"{call} while a stream is captured")


def _way(kind: Any) -> str:
    return {1: "up", 2: "down", 3: "on-device"}.get(int(kind), str(kind))
