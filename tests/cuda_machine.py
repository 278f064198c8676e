"""The machine behind the recorder of CUDA (cuda_recorder.py): memory, streams, graphs, each thread's current device."""

from __future__ import annotations

import enum
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
_OF_ANY_DEVICE = ("cudaGet", "cudaSetDevice", "cudaDriverGet")
"""Calls for which it does not matter what device is current begin so."""


class ProtocolError(AssertionError):
    """A call that CUDA or TensorRT forbids, or leaves undefined. No adapter translates it."""


class cudaError_t(enum.IntEnum):  # noqa: N801
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


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
    """Work in a stream.

    `check` looks once more whether its memory is still there when it runs. `wait` is called when a stream takes it in,
    and what it returns right before it runs.
    """

    name: str
    check: Callable[[], object]
    run: Callable[[], object]
    wait: Callable[[], Callable[[], object]] = lambda: lambda: None


@dataclass(eq=False)
class Handle:
    """A stream, a graph or an executable graph, with the operations in it."""

    kind: str
    number: int
    alive: bool = True
    operations: list[Operation] = field(default_factory=list)
    ready: list[Callable[[], object]] = field(default_factory=list)
    """Of a stream: what the operations' `wait` gave."""
    capturing: Handle | None = None

    def __int__(self) -> int:
        return self.number


class Machine:
    """One process's CUDA. `calls` names everything that was asked for, in order; `failing` calls give that error."""

    def __init__(self, memory: int) -> None:
        self.total = memory
        self.calls: list[str] = []
        self.failing: dict[str, cudaError_t] = {}
        self.last_error = cudaError_t.cudaSuccess
        self._memory: dict[int, Memory] = {}
        self._handles: list[Handle] = []
        self._numbers = itertools.count(1)
        self._thread = threading.local()

    # --- what tests ask

    def leaks(self) -> list[str]:
        """What has not been given back, counted by kind, and the error that nobody has asked for."""
        kinds = Counter(m.side for m in self._memory.values() if m.alive)
        kinds.update(h.kind for h in self._handles if h.alive)
        untold = [] if self.last_error == cudaError_t.cudaSuccess else [f"the error {self.last_error.name}"]
        return sorted(f"{count} {kind}" for kind, count in kinds.items()) + untold

    def taken(self) -> list[str]:
        """The calls since the last time, and forgets them. Which device is current is not told."""
        calls, self.calls[:] = list(self.calls), []
        return [call for call in calls if call not in ("cudaGetDevice", "cudaSetDevice")]

    def used(self) -> int:
        return sum(m.size for m in self._memory.values() if m.alive and m.side == "device")

    # --- what calls are made of

    def note(self, call: str) -> None:
        """Keeps the call. Raises ProtocolError where another device is current, or, for TensorRT, none was made so."""
        self.calls.append(call)
        if call.startswith(_OF_ANY_DEVICE):
            return
        current = getattr(self._thread, "device", None)
        if current or (current is None and not call.startswith("cuda")):
            raise ProtocolError(
                f"{call} in a thread whose current device is {'not set' if current is None else current}"
            )

    def answer(self, call: str, *results: Any) -> tuple[Any, ...]:
        """What CUDA returns: the results, or an error and None for each."""
        self.note(call)
        error = self.failing.get(call.split()[0], cudaError_t.cudaSuccess)
        return (error, *results) if error == cudaError_t.cudaSuccess else self.failed(error, *results)

    def failed(self, error: cudaError_t, *results: Any) -> tuple[Any, ...]:
        self.last_error = error
        return (error, *(None for _ in results))

    @property
    def current(self) -> int:
        """The calling thread's device."""
        return getattr(self._thread, "device", None) or 0

    @current.setter
    def current(self, device: int) -> None:
        self._thread.device = device

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

    def allocate(self, call: str, size: int, side: str, too_much: bool) -> tuple[Any, ...]:
        self.not_while_capturing(call)
        if too_much or call in self.failing:
            self.note(f"{call} {size}")
            return self.failed(self.failing.get(call, cudaError_t.cudaErrorMemoryAllocation), None)
        whole = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        raw = whole[start : start + size]
        memory = Memory(side, whole.ctypes.data + start, size, raw)
        self._memory[memory.address] = memory
        return self.answer(f"{call} {size}", memory.address)

    def free(self, call: str, address: int, side: str) -> tuple[Any, ...]:
        self.not_while_capturing(call)
        memory = self._memory.get(address)
        if memory is None or not memory.alive or memory.side != side:
            raise ProtocolError(f"{call}: {address:#x} is no live allocation of {side} memory")
        if self.busy():
            raise ProtocolError(f"{call} while the stream has work")
        memory.alive = False
        memory.raw[:] = 0xFF
        return self.answer(call)

    def enqueue(self, stream: int | Handle, operation: Operation) -> None:
        """Into the stream, or into the graph that it is captured into."""
        operation.check()
        handle = self.alive(stream, "stream")
        into = handle.capturing or handle
        into.operations.append(operation)
        if into is handle:
            handle.ready.append(operation.wait())

    def work_off(self, stream: Handle) -> None:
        """Runs what waits in the stream."""
        (waiting, stream.operations), (ready, stream.ready) = (stream.operations, []), (stream.ready, [])
        for operation, begin in zip(waiting, ready, strict=True):
            operation.check()
            begin()
            operation.run()

    def busy(self) -> bool:
        return any(h.operations for h in self._handles if h.kind == "stream" and h.alive)

    def handle(self, kind: str) -> Handle:
        """A new one, which counts as a leak until its end."""
        handle = Handle(kind, next(self._numbers))
        self._handles.append(handle)
        return handle

    def alive(self, wanted: Any, kind: str) -> Handle:
        for handle in self._handles:
            if (handle is wanted or (isinstance(wanted, int) and handle.number == wanted)) and handle.kind == kind:
                if handle.alive:
                    return handle
                raise ProtocolError(f"this {kind} has ended")
        raise ProtocolError(f"{wanted!r} is no {kind}")

    def end(self, wanted: Any, kind: str) -> None:
        handle = self.alive(wanted, kind)
        handle.alive, handle.operations = False, []

    def is_capturing(self, stream: int) -> bool:
        return self.alive(stream, "stream").capturing is not None

    def not_while_capturing(self, call: str) -> None:
        if any(h.capturing for h in self._handles):
            raise ProtocolError(f"{call} while a stream is captured")
