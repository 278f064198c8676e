"""Who may use the device: one thread at a time, which then has it as its current device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from edgeomni.errors import EngineError


class Lock:
    """A re-entrant lock. While a thread holds it, device 0 is that thread's current one; afterwards what was before is.

    CUDA allocates and works on the device that is current in the calling thread, which another library may have
    changed. TensorRT takes for granted that one is current, which in a new thread none is before CUDA is called. `call`
    calls a function of the CUDA Runtime API.
    """

    def __init__(self, call: Callable[..., tuple[Any, ...]]) -> None:
        self._lock, self._call, self._depth, self._before = threading.RLock(), call, 0, 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        if self._depth == 1:
            self._before = 0
            with suppress(EngineError):  # of a GPU that has failed, whose next call says so and what it was for
                (self._before,) = self._call("cudaGetDevice")
                self._call("cudaSetDevice", 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth == 1 and self._before:
            with suppress(EngineError):
                self._call("cudaSetDevice", self._before)
        self._depth -= 1
        self._lock.release()
