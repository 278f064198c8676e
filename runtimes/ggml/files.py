"""GGUF files opened for ggml: checked on this side first, then used where they lie in memory."""

from __future__ import annotations

import ctypes as c
import mmap
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeomni import gguf_files
from edgeomni.errors import BundleError, EngineError, EngineUnavailable
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.functions import InitParams, Tensor
from edgeomni.runtimes.ggml.library import library

REMEDY = "copy the bundle again, or export the checkpoint again"
_ALIGNMENT = 32
_WEIGHTS = 1
"""GGML_BACKEND_BUFFER_USAGE_WEIGHTS"""
_REPACKED = "Q4_0"


@dataclass(frozen=True)
class Expected:
    """What a tensor must be: its `shape` as numpy has it, and one of these GGML types by their names."""

    shape: tuple[int, ...]
    types: tuple[str, ...]


def read(path: Path, architecture: str, expected: Mapping[str, Expected]) -> Any:
    """A GGUFReader whose tensors are exactly the expected ones and lie within the file.

    Nothing of ggml runs here. Raises BundleError that names the file and what is wrong, and EngineError where the gguf
    package is missing.
    """
    reader = _reader(path)
    found = _text(reader, "general.architecture")
    if found != architecture:
        raise BundleError(f"{path}: is of the architecture {found[:40]!r}, not {architecture}; {REMEDY}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if missing := sorted(set(expected) - set(tensors)):
        raise BundleError(f"{path}: lacks the tensor {missing[0]}; {REMEDY}")
    if extra := sorted(set(tensors) - set(expected)):
        raise BundleError(f"{path}: holds {extra[0][:60]!r}, which no such model has; {REMEDY}")
    for name, wanted in expected.items():
        _check(path, reader, tensors[name], wanted)
    return reader


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        from edgeomni.engines import ENGINES

        said = f"the gguf package is not installed; {ENGINES['llama.cpp'].install}"
        raise EngineUnavailable("package", said) from exc
    if path.is_file():
        gguf_files.read(path, BundleError)  # counts that the file cannot hold would keep the package's reader busy
    try:
        return GGUFReader(path)
    except FileNotFoundError as exc:
        raise BundleError(f"{path}: no such file; {REMEDY}") from exc
    except Exception as exc:  # whatever broken bytes lead numpy and the package to
        reason = str(exc).partition("\n")[0][:120] or type(exc).__name__
        raise BundleError(f"{path}: is no GGUF file that can be read ({reason}); {REMEDY}") from exc


def _text(reader: Any, key: str) -> str:
    field = reader.fields.get(key)
    try:
        return str(field.contents()) if field is not None else ""
    except (IndexError, ValueError, UnicodeDecodeError):
        return ""


def _check(path: Path, reader: Any, tensor: Any, wanted: Expected) -> None:
    shape = tuple(int(n) for n in tensor.shape[::-1])
    kind = tensor.tensor_type.name
    if shape != wanted.shape or kind not in wanted.types:
        allowed = " or ".join(wanted.types)
        raise BundleError(
            f"{path}: {tensor.name} is {kind} of {list(shape)}, not {allowed} of {list(wanted.shape)}; {REMEDY}"
        )
    start = int(tensor.data_offset)
    if start % _ALIGNMENT or start + int(tensor.n_bytes) > len(reader.data):
        raise BundleError(f"{path}: {tensor.name} lies beyond the end of the file; {REMEDY}")


class Weights:
    """A checked file's tensors as ggml's.

    On the CPU they lie in the file's own memory map, but for those named by `repacked` that the CPU has an interleaved
    layout for: these are copied into it. On a GPU they are copied to it. Raises EngineError where ggml refuses.
    """

    def __init__(self, reader: Any, backend: Backend | None = None, repacked: Collection[str] = ()) -> None:
        self._ggml, self._reader, self._backend = library(), reader, backend
        overhead = self._ggml.ggml_tensor_overhead() * (2 * len(reader.tensors) + 1)
        self._context = self._ggml.ggml_init(InitParams(overhead, None, True))
        if not self._context:
            raise EngineUnavailable("memory", "ggml cannot take a file's tensors; check that memory is left")
        self._buffers: list[int] = []
        self._freed = weakref.finalize(self, _free, self._ggml, self._context, self._buffers)
        self._freed.atexit = False
        if backend is None or backend.on_cpu:
            self._tensors = self._in_place(repacked)
        else:
            self._tensors = self._copied(backend)

    def __getitem__(self, name: str) -> int:
        return self._tensors[name]

    def get(self, name: str) -> int | None:
        """The tensor of that name; None where the file has none."""
        return self._tensors.get(name)

    def release_pages(self) -> None:
        """Gives the file's pages back to the system. They come back from its cache when they are next read."""
        if hasattr(mmap, "MADV_DONTNEED") and isinstance(file := self._reader.data.base, mmap.mmap):
            file.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Gives back what ggml holds. The tensors are not used afterwards."""
        self._tensors.clear()
        self._freed()

    def _in_place(self, repacked: Collection[str]) -> dict[str, int]:
        base = self._reader.data.ctypes.data
        buffer = self._kept(self._ggml.ggml_backend_cpu_buffer_from_ptr(base, len(self._reader.data)))
        interleaved = self._backend.repacking_type() if self._backend is not None and repacked else None
        placed = {}
        for tensor in self._reader.tensors:
            repacks = interleaved and tensor.name in repacked and tensor.tensor_type.name == _REPACKED
            address = base + int(tensor.data_offset)
            found = self._repacked(tensor, address, interleaved) if repacks else None
            if found is None:
                found = self._made(tensor)
                self._allocate(buffer, found, address)
            placed[tensor.name] = found
        return placed

    def _repacked(self, tensor: Any, address: int, interleaved: int | None) -> int | None:
        """A copy in the CPU's interleaved layout; None where it has none for this tensor."""
        g, made = self._ggml, self._made(tensor)
        size = g.ggml_backend_buft_get_alloc_size(interleaved, made)
        buffer = g.ggml_backend_buft_alloc_buffer(interleaved, size + 2 * _ALIGNMENT)
        if not buffer:
            raise EngineUnavailable("memory", "ggml cannot allocate a weight; check that memory is left")
        start = -(-g.ggml_backend_buffer_get_base(buffer) // 64) * 64
        self._allocate(buffer, made, start)
        if not Tensor.from_address(made).extra:
            g.ggml_backend_buffer_free(buffer)
            return None
        g.ggml_backend_buffer_set_usage(self._kept(buffer), _WEIGHTS)
        g.ggml_backend_tensor_set(made, address, 0, g.ggml_nbytes(made))
        return made

    def _copied(self, backend: Backend) -> dict[str, int]:
        g, base = self._ggml, self._reader.data.ctypes.data
        placed = {tensor.name: self._made(tensor) for tensor in self._reader.tensors}
        buffer = self._kept(g.ggml_backend_alloc_ctx_tensors_from_buft(self._context, backend.buffer_type))
        g.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)
        for tensor in self._reader.tensors:
            address = base + int(tensor.data_offset)
            g.ggml_backend_tensor_set(placed[tensor.name], address, 0, int(tensor.n_bytes))
        return placed

    def _kept(self, buffer: int | None) -> int:
        if not buffer:
            raise EngineUnavailable("memory", "ggml cannot take a file's memory; check that memory is left")
        self._buffers.append(buffer)
        return buffer

    def _made(self, tensor: Any) -> int:
        shape = [int(n) for n in tensor.shape]
        made: int = self._ggml.ggml_new_tensor_4d(
            self._context, int(tensor.tensor_type), *shape, *[1] * (4 - len(shape))
        )
        if self._ggml.ggml_nbytes(made) != int(tensor.n_bytes):
            raise EngineError(f"ggml stores {tensor.name} in another number of bytes; update llama-cpp-python")
        return made

    def _allocate(self, buffer: int, tensor: int, address: int) -> None:
        if status := self._ggml.ggml_backend_tensor_alloc(buffer, tensor, c.c_void_p(address)):
            raise EngineError(f"ggml cannot place a weight (status {status}); update llama-cpp-python")


def _free(ggml: Any, context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(context)
