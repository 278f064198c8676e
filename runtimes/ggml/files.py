"""GGUF files opened for ggml: checked on this side first, then used where they lie in memory."""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeomni.errors import BundleError, EngineError
from edgeomni.runtimes.ggml.library import library

REMEDY = "copy the bundle again, or export the checkpoint again"


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

        raise EngineError(f"the gguf package is not installed; {ENGINES['llama.cpp'].install}") from exc
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
    if start % 32 or start + int(tensor.n_bytes) > len(reader.data):
        raise BundleError(f"{path}: {tensor.name} lies beyond the end of the file; {REMEDY}")


class Weights:
    """A checked file's tensors as ggml's, on the file's own memory map. Raises EngineError where ggml refuses."""

    def __init__(self, reader: Any) -> None:
        self._ggml, self._reader = library(), reader
        overhead = self._ggml.ggml_tensor_overhead() * (len(reader.tensors) + 1)
        from edgeomni.runtimes.ggml.library import InitParams

        self._context = self._ggml.ggml_init(InitParams(overhead, None, True))
        base = reader.data.ctypes.data
        self._buffer = self._ggml.ggml_backend_cpu_buffer_from_ptr(base, len(reader.data))
        if not self._context or not self._buffer:
            raise EngineError("ggml cannot take a file's memory; check that memory is left")
        self._tensors = {tensor.name: self._placed(tensor, base) for tensor in reader.tensors}

    def __getitem__(self, name: str) -> int:
        return self._tensors[name]

    def close(self) -> None:
        """Gives back what ggml holds. The tensors are not used afterwards."""
        if self._context:
            self._ggml.ggml_backend_buffer_free(self._buffer)
            self._ggml.ggml_free(self._context)
            self._context = self._buffer = None
            self._tensors.clear()

    def _placed(self, tensor: Any, base: int) -> int:
        columns, rows = (int(n) for n in tensor.shape)
        placed: int = self._ggml.ggml_new_tensor_2d(self._context, int(tensor.tensor_type), columns, rows)
        if self._ggml.ggml_nbytes(placed) != int(tensor.n_bytes):
            raise EngineError(f"ggml stores {tensor.name} in another number of bytes; update llama-cpp-python")
        status = self._ggml.ggml_backend_tensor_alloc(self._buffer, placed, c.c_void_p(base + int(tensor.data_offset)))
        if status:
            raise EngineError(f"ggml cannot place {tensor.name} (status {status})")
        return placed
