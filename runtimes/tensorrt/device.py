"""One CUDA device as the adapters use it: one stream, memory on both sides, copies, captured graphs.

Through cuda-python (cuda.bindings.runtime, the CUDA Runtime API) and nothing else. It is imported when a device is
opened, so that a machine without CUDA never loads it. All addresses are integers, all sizes are bytes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.install_hint import install_command
from edgeomni.runtimes.tensorrt.lock import Lock

_REMEDY = "check `nvidia-smi` (on a Jetson `tegrastats`), or run on another engine: `--engine onnxruntime --device cpu`"
_log = logging.getLogger("edgeomni")


@dataclass(frozen=True)
class Facts:
    """What an engine must have been made for. `driver` is the newest CUDA version that the driver serves, as 12060.

    An `integrated` GPU (Jetson) shares the system's memory.
    """

    name: str
    sm: str
    driver: int
    integrated: bool = False


class Device:
    """Device 0 of those that CUDA_VISIBLE_DEVICES leaves, with the one stream that all work of this process goes into.

    `lock` is held by whoever allocates or enqueues, up to the end of what belongs together. Get one from `acquire`,
    which shares it. Raises EngineError where cuda-python, a driver or a device is missing.
    """

    def __init__(self) -> None:
        self._cuda = _bindings()
        self.facts = self._read_facts()
        self.lock = Lock(self._call)
        self.garbage: deque[ExitStack] = deque()
        self._pending = False
        self.users = 0
        with self.lock:
            (stream,) = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._stream: Any = stream

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def free_memory(self) -> int | None:
        """Bytes that can be allocated now; None where the system could free more, since it holds files in them."""
        if self.facts.integrated:
            return None
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int) -> int:
        """The address of so many new bytes of device memory, contents undefined. Raises EngineError for too many."""
        try:
            (address,) = self._call("cudaMalloc", max(size, 1), what=f"{_mib(size)} of GPU memory cannot be had")
        except EngineError as exc:
            raise EngineUnavailable("memory", str(exc)) from exc
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> int:
        """The address of so many new bytes of host memory that the device reads and writes by itself."""
        flags = self._cuda.cudaHostAllocDefault
        (address,) = self._call("cudaHostAlloc", max(size, 1), flags, what=f"{_mib(size)} cannot be pinned")
        return int(address)

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def upload(self, target: int, source: int, size: int) -> None:
        """Enqueues a copy from pinned memory to the device."""
        self._copy(target, source, size, "cudaMemcpyHostToDevice")

    def download(self, target: int, source: int, size: int) -> None:
        """Enqueues a copy from the device to pinned memory, to be read after `synchronize`."""
        self._copy(target, source, size, "cudaMemcpyDeviceToHost")

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueues a copy within the device."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def copy_strided(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        """Enqueues copies of `width` bytes within the device, `height` of them, `pitch` bytes apart on both sides."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._enqueue("cudaMemcpy2DAsync", target, pitch, source, pitch, width, height, kind)

    def zero(self, address: int, size: int) -> None:
        """Enqueues that so many bytes become 0."""
        self._enqueue("cudaMemsetAsync", address, 0, size)

    def enqueued(self) -> None:
        """Says that something else (an engine) puts work into the stream; one that fails may have put in a part."""
        self._pending = True

    def synchronize(self) -> None:
        """Waits until the stream is empty. Raises EngineError for work that failed since the last time."""
        if self._pending:
            self._call("cudaStreamSynchronize", self._stream, what="the GPU failed")
            self._pending = False

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` puts into the stream, recorded instead of run. Raises EngineError where that cannot be.

        Nothing may be pending. Other threads of the process may go on using CUDA meanwhile.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:  # an interrupt as well: a stream that is left capturing takes no other work
            with contextlib.suppress(EngineError):  # a broken capture ends with an error, and often without a graph
                (graph,) = self._call("cudaStreamEndCapture", self._stream)
                self._destroy_graph(graph)
            self._pending = False
            raise
        self._pending = False
        (graph,) = self._call("cudaStreamEndCapture", self._stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._destroy_graph(graph)
        return Graph(self, executable)

    def launch(self, executable: Any) -> None:
        self._enqueue("cudaGraphLaunch", executable)

    def destroy(self, executable: Any) -> None:
        self._call("cudaGraphExecDestroy", executable)

    def dispose(self, stack: ExitStack) -> None:
        """Waits for the stream, then runs what gives things back."""
        with self.lock:
            with contextlib.suppress(EngineError):  # what failed has been told where it was waited for
                self.synchronize()
            try:
                stack.close()
            except EngineError as exc:
                _log.warning("GPU memory could not be given back: %s", exc)

    def collect(self) -> None:
        """Gives back what arenas left behind."""
        while self.garbage:
            self.dispose(self.garbage.popleft())

    def close(self) -> None:
        """Gives back the stream, and what arenas left behind."""
        with self.lock:
            self.collect()
            with contextlib.suppress(EngineError):
                self.synchronize()
            self._call("cudaStreamDestroy", self._stream)

    def _destroy_graph(self, graph: Any) -> None:
        if graph:
            self._call("cudaGraphDestroy", graph)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self._enqueue("cudaMemcpyAsync", target, source, size, getattr(self._cuda.cudaMemcpyKind, kind))

    def _enqueue(self, function: str, *arguments: Any) -> None:
        self._pending = True
        self._call(function, *arguments, self._stream)

    def _call(self, function: str, *arguments: Any, what: str = "") -> tuple[Any, ...]:
        """Calls a function of the runtime API, whose first result is its error. Raises EngineError for one."""
        error, *results = getattr(self._cuda, function)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            self._cuda.cudaGetLastError()  # else the next to ask, in whatever library, takes the error for its own
            raise EngineError(f"{what or 'CUDA failed'}: {function} says {_named(self._cuda, error)}; {_REMEDY}")
        return tuple(results)

    def _read_facts(self) -> Facts:
        try:
            (count,) = self._call("cudaGetDeviceCount", what="no NVIDIA GPU can be used")
        except EngineError as exc:
            raise EngineUnavailable("device", str(exc)) from exc
        if not count:
            raise EngineUnavailable("device", f"no NVIDIA GPU can be used: CUDA sees none; {_REMEDY}")
        (properties,) = self._call("cudaGetDeviceProperties", 0)
        (driver,) = self._call("cudaDriverGetVersion")
        name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else properties.name
        sm = f"sm_{properties.major}{properties.minor}"
        return Facts(name.strip("\0 "), sm, int(driver), bool(properties.integrated))


class Graph:
    """Captured work, launched as one. Addresses and shapes in it are those of the capture; contents are read anew."""

    def __init__(self, device: Device, executable: Any) -> None:
        self._device, self._executable = device, executable

    def launch(self) -> None:
        self._device.launch(self._executable)

    def close(self) -> None:
        self._device.destroy(self._executable)


def acquire() -> Device:
    """The process's Device, opened where it is not. Raises EngineError as Device does."""
    global _shared
    with _sharing:
        if _shared is None:
            _shared = Device()
        _shared.users += 1
        return _shared


def release(device: Device) -> None:
    """Gives one use of the device back; the last one closes it."""
    global _shared
    with _sharing:
        device.users -= 1
        if device.users == 0:
            _shared = None if device is _shared else _shared
            device.close()


_shared: Device | None = None
_sharing = threading.RLock()


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise EngineUnavailable(
            "package",
            f"the tensorrt engine needs cuda-python, which is not installed or cannot be loaded ({exc}); "
            f"{install_command('tensorrt')} (for a Jetson: {install_command('jetson')})",
        ) from exc
    return runtime


def _named(cuda: Any, error: Any) -> str:
    """The error's name, and the sentence that CUDA has for it."""
    _, name = cuda.cudaGetErrorName(error)
    _, text = cuda.cudaGetErrorString(error)
    return " ".join(t.decode(errors="replace") if isinstance(t, bytes) else str(t) for t in (name, b"-", text))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
