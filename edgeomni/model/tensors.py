"""Reading weights safely, and saying everything that does not fit at once."""

from __future__ import annotations

import hashlib
import json
import pickle
import reprlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, EdgeOmniError

Shapes = Mapping[str, tuple[int, ...]]
_NAMED_AT_MOST = 40
_REASON_LENGTH = 300


@contextmanager
def translated(message: str) -> Iterator[None]:
    """Whatever foreign code raises over a checkpoint's files becomes CheckpointError(message, with the cause).

    The readers and constructors called here belong to other packages, and a damaged or hostile file brings out any
    exception of theirs; so all of them are caught. Errors that are EdgeOmni's own pass through.
    """
    try:
        yield
    except EdgeOmniError:
        raise
    except Exception as exc:
        raise CheckpointError(f"{message} ({_reason(exc)})") from exc


def read_text(path: Path) -> str:
    """Raises CheckpointError for a file that is missing or no UTF-8 text."""
    with translated(f"{path}: not readable as text; download or copy it again"):
        return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for a file that holds no JSON object."""
    with translated(f"{path}: not readable as JSON; download or copy it again"):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download or copy it again")
    return config


def read_torch(path: Path) -> Any:
    """What torch.save wrote, weights only, memory-mapped where the format allows.

    Raises CheckpointError for a file that is missing, truncated, or a pickle that holds more than weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with _undamaged(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as exc:
            if "Unsupported" in str(exc) or "GLOBAL" in str(exc):
                raise CheckpointError(
                    f"{path}: a pickle that holds more than weights, which could run code when it is read; "
                    "refused. Save its state dict alone, or as safetensors"
                ) from exc
            raise


def read_safetensors(path: Path, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors whose names `keep` wants. Raises CheckpointError for a file that is missing, truncated or another."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with _undamaged(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118 - it is no dict


def state_of(data: Any, where: Path | str) -> dict[str, Tensor]:
    """The state dict in what `read_torch` gave: itself, or its `model` / `state_dict` entry.

    Raises CheckpointError where there is none, and for tensors that hold fewer numbers than their shape announces.
    """
    for key in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in data.items()):
        raise CheckpointError(f"{where}: holds no state dict of tensors")
    if hollow := sorted(name for name, tensor in data.items() if not _holds_its_shape(tensor)):
        raise CheckpointError(
            f"{where}: tensor(s) that store fewer numbers than their shape announces: {_listed(hollow)}; "
            "save them as plain, contiguous tensors"
        )
    return dict(data)


def _holds_its_shape(tensor: Tensor) -> bool:
    """False for sparse, meta and expanded tensors (stride 0), which would grow beyond the file when they are used."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


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


def refuse_deeper(where: str, layers: Mapping[str, Any], tensors: int) -> None:
    """Raises CheckpointError for a number of layers that the weights cannot hold.

    Every layer has at least one tensor of its own. Checked before any layer is built, since a configuration may
    announce 10**9 of them. `layers`: the configuration's name of each count, and its value.
    """
    for name, value in layers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{where}: {name} must be a whole number, 0 or more, not {reprlib.repr(value)}")
        if value > tensors:
            raise CheckpointError(
                f"{where}: the configuration's {name} is {reprlib.repr(value)}, and the weights hold {tensors} tensors "
                "in all; use the files of one checkpoint"
            )


def refuse_unusable(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError naming all weights that are no floating-point tensors, or hold NaN or infinity."""
    if foreign := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        kinds = [f"{name} ({str(tensors[name].dtype).removeprefix('torch.')})" for name in foreign]
        raise CheckpointError(f"{where}: weights that are no floating-point numbers: {_listed(kinds)}")
    if broken := sorted(name for name, tensor in tensors.items() if not _finite(tensor)):
        raise CheckpointError(
            f"{where}: NaN or infinite numbers in {_listed(broken)}; training diverged or the file is damaged: "
            "use an earlier checkpoint, or copy it again"
        )


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite as float32, in which everything here computes.

    A sum takes a fraction of isfinite's time and memory, and no NaN or infinity can leave it finite. A sum of large
    finite numbers may overflow, so only then every number is looked at.
    """
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.float().isfinite().all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


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


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as exc:  # torch and safetensors raise a dozen kinds over damaged files
        raise CheckpointError(f"{path}: damaged or truncated ({_reason(exc)}); download or copy it again") from exc


def _reason(exc: Exception) -> str:
    """The first line of what an exception says, never long: the text of some holds what the file held."""
    return (str(exc).splitlines() or [type(exc).__name__])[0][:_REASON_LENGTH] or type(exc).__name__
