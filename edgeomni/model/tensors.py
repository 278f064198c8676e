"""Reading weights safely, and saying everything that does not fit at once."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
_NAMED_AT_MOST = 40


def read_torch(path: Path) -> Any:
    """What torch.save wrote, weights only, memory-mapped where the format allows.

    Raises CheckpointError for a file that is missing, truncated, or a pickle that holds more than weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as exc:
        if "Unsupported" in str(exc) or "GLOBAL" in str(exc):
            raise CheckpointError(
                f"{path}: a pickle that holds more than weights, which could run code when it is read; "
                "refused. Save its state dict alone, or as safetensors"
            ) from exc
        raise _damaged(path, exc) from exc
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise _damaged(path, exc) from exc


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError for a file that is missing, truncated or not safetensors."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as exc:
        raise _damaged(path, exc) from exc


def state_of(data: Any, where: Path) -> dict[str, Tensor]:
    """The state dict in what `read_torch` gave: itself, or its `model` / `state_dict` entry."""
    for key in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise CheckpointError(f"{where}: holds no state dict of tensors")
    return data


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items()}


def differences(expected: Shapes, given: Shapes, *, optional: Iterable[str] = ()) -> list[str]:
    """One line per tensor that is missing, unexpected or of another shape."""
    missing = [f"missing: {name} {expected[name]}" for name in expected if name not in given]
    extra = [f"unexpected: {name} {given[name]}" for name in given if name not in expected and name not in optional]
    shaped = [
        f"wrong shape: {name} is {given[name]}, not {expected[name]}"
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    return sorted(missing) + sorted(extra) + sorted(shaped)


def refuse(where: str, lines: list[str]) -> None:
    """Raises CheckpointError naming every line, if there is any."""
    if not lines:
        return
    shown = lines[:_NAMED_AT_MOST]
    rest = [f"... and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    raise CheckpointError(
        f"{where}: {len(lines)} tensor(s) do not fit the configuration; use the files of one checkpoint:\n  "
        + "\n  ".join(shown + rest)
    )


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the files' names and contents, in order of name."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        part = hashlib.sha256()
        with path.open("rb") as f:
            while block := f.read(1 << 22):
                part.update(block)
        whole.update(f"{path.name} {part.hexdigest()}\n".encode())
    return whole.hexdigest()


def _damaged(path: Path, exc: Exception) -> CheckpointError:
    first = (str(exc).splitlines() or [type(exc).__name__])[0]
    return CheckpointError(f"{path}: damaged or truncated ({first}); download or copy it again")
