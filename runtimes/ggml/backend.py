"""What computes a graph: ggml's CPU backend, or a GPU's where the build of ggml has one."""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.engines import ENGINES
from edgeomni.errors import EngineUnavailable
from edgeomni.install_hint import build_command
from edgeomni.runtimes.ggml.library import GPU, IGPU, library

PIECE = 32768
"""Values that numpy's operations work on at once: fewer cost more calls than they save in cache misses."""
_BUILD = build_command("llama-cpp-python", "-DGGML_CUDA=on")


class Backend:
    """One backend of ggml. Graphs may share it as long as they do not run at the same time.

    `device` is "cpu", or "cuda" for the first GPU that this build of ggml knows. `threads` are those of the CPU
    (None: all cores). Raises EngineError where ggml is missing or has no GPU.
    """

    def __init__(self, threads: int | None = None, device: str = "cpu") -> None:
        self.ggml, self.on_cpu = library(), device == "cpu"
        self.numpy_operations = self.on_cpu
        """Whether graphs may call back into numpy."""
        self.threads = min(threads or os.cpu_count() or 1, 512)  # GGML_MAX_N_THREADS
        self.handle = self.ggml.ggml_backend_cpu_init() if self.on_cpu else _gpu(self.ggml)
        if not self.handle:
            said = f"ggml cannot start on the device {device!r}; check that its memory is not all taken"
            raise EngineUnavailable("device", said)
        if self.on_cpu:
            self.ggml.ggml_backend_cpu_set_n_threads(self.handle, self.threads)
        self.buffer_type = self.ggml.ggml_backend_get_default_buffer_type(self.handle)
        self._scratch: dict[int, F32] = {}
        self._freed = weakref.finalize(self, self.ggml.ggml_backend_free, self.handle)
        self._freed.atexit = False

    @property
    def open(self) -> bool:
        return bool(self._freed.alive)

    def set_threads(self, threads: int) -> None:
        """How many threads of the CPU compute from the next run on."""
        self.threads = min(max(1, threads), 512)
        if self.on_cpu:
            self.ggml.ggml_backend_cpu_set_n_threads(self.handle, self.threads)

    def scratch(self, thread: int) -> F32:
        """Room [3, PIECE] for numpy's operations in one of the backend's threads, which keep no memory of their own."""
        if thread not in self._scratch:
            self._scratch[thread] = np.empty((3, PIECE), np.float32)
        return self._scratch[thread]

    def close(self) -> None:
        """Gives the backend back. No graph on it runs afterwards."""
        self._freed()

    def repacking_type(self) -> int | None:
        """The CPU's buffer type that stores quantized rows interleaved, as its fast kernels read them; None without."""
        if not self.on_cpu:
            return None
        from ctypes import CFUNCTYPE, POINTER, c_void_p

        registry = self.ggml.ggml_backend_cpu_reg()
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        types: Any = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.ggml.ggml_backend_reg_dev_get(registry, 0))
        at = 0
        while types and types[at]:
            if self.ggml.ggml_backend_buft_name(types[at]) == b"CPU_REPACK":
                return int(types[at])
            at += 1
        return None


def _gpu(ggml: Any) -> Any:
    ggml.ggml_backend_load_all()  # backends that are libraries of their own; a build may have them linked in as well
    device = ggml.ggml_backend_dev_by_type(GPU) or ggml.ggml_backend_dev_by_type(IGPU)
    if not device:
        raise EngineUnavailable(
            "device",
            f"this build of llama-cpp-python has no GPU backend, or no GPU is here; build it with one ({_BUILD}), or "
            f"run on the CPU. {ENGINES['llama.cpp'].install} gives a build for the CPU",
        )
    return ggml.ggml_backend_dev_init(device, None)
