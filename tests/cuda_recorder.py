"""A strict recorder in the place of cuda.bindings.runtime, for tests on machines without a GPU.

It does not answer what a test expects: "device" and pinned memory are real memory, copies copy, and engines
(tensorrt_recorder.py) compute their ONNX graph. Like CUDA's, its stream runs later than it is called: what is enqueued
waits for the next synchronization, and what a waiting copy will write is full of NaN until then, so that reading it too
early gives wrong numbers. Unlike CUDA it refuses, with ProtocolError, every call that breaks the rules: addresses
outside live memory of the right side, sizes that leave it, host memory that changes while a copy of it waits, frees of
what is not there or still in use, calls that a capture forbids, objects used after their end, work on another device
than the thread's current one. `leaks` names what was not given back. New memory is full of NaN.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_machine import ALIGNMENT, Handle, Machine, Operation, ProtocolError, cudaError_t
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "Operation", "ProtocolError", "Recorder", "cudaError_t"]


class cudaMemcpyKind(enum.IntEnum):  # noqa: N801
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):  # noqa: N801
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Recorder(Machine):
    """One process's CUDA, on one device."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self, name: str = "NVIDIA Recorder", sm: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        super().__init__(memory)
        self.name, self.sm, self.driver, self.devices = name, sm, 13000, 1
        self.integrated = False

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

    # --- devices and errors

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self.answer("cudaGetDeviceCount", self.devices)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self.answer("cudaGetDevice", self.current)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        if not 0 <= device < self.devices:
            raise ProtocolError(f"cudaSetDevice: there is no device {device}")
        self.current = device
        return self.answer("cudaSetDevice")

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        facts = types.SimpleNamespace(
            name=self.name.encode(), major=self.sm[0], minor=self.sm[1], integrated=int(self.integrated)
        )
        return self.answer("cudaGetDeviceProperties", facts)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self.answer("cudaDriverGetVersion", self.driver)

    def cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, b"as recorded"

    def cudaGetLastError(self) -> tuple[Any, ...]:
        error, self.last_error = self.last_error, cudaError_t.cudaSuccess
        return (error,)

    # --- memory

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self.answer("cudaMemGetInfo", self.total - self.used(), self.total)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self.allocate("cudaMalloc", size, "device", self.used() + size > self.total)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self.allocate("cudaHostAlloc", size, "pinned", False)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self.free("cudaFree", address, "device")

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self.free("cudaFreeHost", address, "pinned")

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        def span() -> NDArray[np.uint8]:
            return self.span(address, size, "device", "cudaMemsetAsync")

        def run() -> None:
            span()[:] = value

        self.enqueue(stream, Operation("memset", span, run))
        return self.answer("cudaMemsetAsync")

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any, ...]:
        return self._copy(f"cudaMemcpyAsync {_way(kind)} {size}", target, source, [(0, size)], kind, stream)

    def cudaMemcpy2DAsync(
        self, target: int, dpitch: int, source: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> tuple[Any, ...]:
        if width > min(dpitch, spitch) or dpitch != spitch:
            raise ProtocolError(f"cudaMemcpy2DAsync: rows of {width} bytes, pitches {dpitch} and {spitch}")
        rows = [(i * dpitch, width) for i in range(height)]
        return self._copy(f"cudaMemcpy2DAsync {_way(kind)} {width}x{height}", target, source, rows, kind, stream)

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

        def wait() -> Callable[[], object]:
            return _guarded(call, check(), to, where)

        self.enqueue(stream, Operation(_way(kind), check, run, wait))
        return self.answer(call)

    # --- streams and graphs

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        made = None if "cudaStreamCreateWithFlags" in self.failing else self.handle("stream")
        return self.answer("cudaStreamCreateWithFlags", made)

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        handle = self.alive(stream, "stream")
        if handle.operations:
            raise ProtocolError(f"the stream ends with {len(handle.operations)} operations waiting")
        handle.alive = False
        return self.answer("cudaStreamDestroy")

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        handle = self.alive(stream, "stream")
        self.not_while_capturing("cudaStreamSynchronize")
        self.work_off(handle)
        return self.answer("cudaStreamSynchronize")

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:
        handle = self.alive(stream, "stream")
        self.not_while_capturing("cudaStreamBeginCapture")
        if mode != cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            raise ProtocolError("a capture in another mode would break other threads' use of CUDA")
        if "cudaStreamBeginCapture" not in self.failing:
            handle.capturing = Handle("graph", next(self._numbers))
        return self.answer("cudaStreamBeginCapture")

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        handle = self.alive(stream, "stream")
        if (graph := handle.capturing) is None:
            raise ProtocolError("the capture that ends has not begun")
        handle.capturing = None
        if "cudaStreamEndCapture" not in self.failing:
            self._handles.append(graph)
        return self.answer("cudaStreamEndCapture", graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        operations = list(self.alive(graph, "graph").operations)
        if "cudaGraphInstantiate" in self.failing:
            return self.answer("cudaGraphInstantiate", None)
        made = self.handle("executable graph")
        made.operations = operations
        return self.answer("cudaGraphInstantiate", made)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self.end(graph, "graph")
        return self.answer("cudaGraphDestroy")

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        if self.busy():
            raise ProtocolError("an executable graph ends while the stream has work")
        self.end(executable, "executable graph")
        return self.answer("cudaGraphExecDestroy")

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> tuple[Any, ...]:
        operations = self.alive(executable, "executable graph").operations
        for operation in operations if "cudaGraphLaunch" not in self.failing else ():
            self.enqueue(stream, operation)
        return self.answer(f"cudaGraphLaunch {' '.join(o.name for o in operations)}")


def _guarded(
    call: str, pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], to: str, where: str
) -> Callable[[], object]:
    """While a copy waits, nobody may write the host memory that it reads, or read the host memory that it writes."""
    given = [source.copy() for _, source in pairs] if where == "pinned" else []
    for target, _ in pairs if to == "pinned" else ():
        target[:] = 0xFF

    def unchanged() -> None:
        for (_, source), before in zip(pairs, given, strict=False):
            if not np.array_equal(source, before):
                raise ProtocolError(f"{call}: the host has written to what a waiting copy reads")

    return unchanged


def _way(kind: Any) -> str:
    return {1: "up", 2: "down", 3: "on-device"}.get(int(kind), str(kind))
