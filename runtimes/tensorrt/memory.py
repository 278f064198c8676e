"""Memory on both sides of a device, owned by arenas: single arrays, and blocks of named arrays that one copy moves."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.runtimes.tensorrt.device import Device

ALIGNMENT = 256
"""TensorRT asks for tensors that start at multiples of this; cudaMalloc gives such addresses."""


class Arena:
    """Owns memory, graphs and whatever else must be given back, in the order opposite to how they came.

    `close` does so at once. What of an arena that goes without it is kept in the device's `garbage`, since an object
    may go at any moment, also while a graph is captured, which forbids to free anything.
    """

    def __init__(self, device: Device) -> None:
        self.device, self._stack = device, ExitStack()
        self._end = weakref.finalize(self, device.garbage.append, self._stack)
        self._end.atexit = False  # CUDA may be gone by then, and the process gives everything back anyway

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def close(self) -> None:
        """Waits for the stream, then gives everything back. Does nothing the second time."""
        if self._end.detach():
            self.device.dispose(self._stack)

    def array(self, size: int) -> int:
        """The address of so many new bytes of device memory, zeros once the stream gets there."""
        address = self.device.allocate(size)
        self._stack.callback(self.device.free, address)
        self.device.zero(address, size)
        return address

    def pinned(self, size: int) -> int:
        address = self.device.allocate_pinned(size)
        self._stack.callback(self.device.free_pinned, address)
        return address

    def keep(self, close: Callable[[], object]) -> None:
        """Calls `close` when the arena is closed."""
        self._stack.callback(close)


class Block:
    """Named arrays in one piece of memory, alike on the device and in pinned host memory, so that one copy moves all.

    `host` are views of the pinned side. Every array starts at a multiple of ALIGNMENT.
    """

    def __init__(self, arena: Arena, arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self._device, self._offsets, at = arena.device, dict[str, int](), 0
        for name, (shape, dtype) in arrays.items():
            self._offsets[name] = at
            at += aligned(size_of(shape, dtype.itemsize))
        self.size = max(at, ALIGNMENT)
        self._on_device, self._on_host = arena.array(self.size), arena.pinned(self.size)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self._on_host))
        self.host: dict[str, NDArray[Any]] = {
            name: raw[self._offsets[name] :][: size_of(shape, dtype.itemsize)].view(dtype).reshape(shape)
            for name, (shape, dtype) in arrays.items()
        }

    def address(self, name: str) -> int:
        """Where the array lies on the device."""
        return self._on_device + self._offsets[name]

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def upload(self, size: int | None = None) -> None:
        """Enqueues the copy to the device, of the first `size` bytes."""
        self._device.upload(self._on_device, self._on_host, self.size if size is None else size)

    def download(self, size: int | None = None) -> None:
        """Enqueues the copy to the host, of the first `size` bytes."""
        self._device.download(self._on_host, self._on_device, self.size if size is None else size)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def size_of(shape: tuple[int, ...], itemsize: int) -> int:
    return int(np.prod(shape, dtype=np.int64)) * itemsize
