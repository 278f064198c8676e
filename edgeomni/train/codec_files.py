"""What a codec run reads and writes: codecs in SNAC's published layout, and the state that a run goes on from."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..model import checkpoints, codecs, parts, sources
from ..model.tensors import read_torch, shapes_of
from ..outputs import first_few, new_directory, strangers, write_file
from ..schema import Source, typed
from .codec_config import CodecSizes

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
"""The names under which SNAC.from_pretrained looks for them."""
STATE = "state.pt"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def read_codec(start: str) -> tuple[CodecSizes, dict[str, Tensor]]:
    """Sizes and tensors of a SNAC: a codec's directory or hub id, or a checkpoint of the omni model.

    Raises CheckpointError for what cannot be read or does not fit together, TrainError for a codec of another kind.
    """
    config, state = _of_checkpoint(start) if checkpoints.kind_of(start) else _of_part(start)
    if config.pop("kind") != "snac":
        raise TrainError(f"{start}: its codec is a Mimi, and only SNAC codecs can be trained; give a SNAC")
    source = Source(f"{start}: the codec's configuration", TrainError, "only codecs of SNAC's sizes can be trained")
    return typed(config, CodecSizes, source), state


def build(sizes: CodecSizes, state: dict[str, Tensor] | None = None) -> nn.Module:
    """A SNAC with these tensors, or else the package's own random ones (torch's global random numbers)."""
    from snac import SNAC  # model/codecs.py has imported it by now, without its warning

    codec = SNAC(**sizes.arguments())
    if state is not None:
        codec.load_state_dict(state)
    return codec.train()


def write_codec(codec: nn.Module, sizes: CodecSizes, directory: Path) -> None:
    """config.json and pytorch_model.bin, whole or not at all; replaces a codec that lies there. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in codec.state_dict().items()}
    with new_directory(directory, _objection) as target:
        (target / CONFIG).write_text(json.dumps(sizes.arguments(), indent=2) + "\n", encoding="utf-8")
        (target / WEIGHTS).write_bytes(_saved(tensors))


def write_state(state: dict[str, Any], folder: Path) -> None:
    """The run's state, whole or not at all. Raises OSError."""
    write_file(folder / STATE, _saved(state), force=True)


def read_state(folder: Path) -> dict[str, Any] | None:
    """The last state saved, None where there is none yet. Raises CheckpointError for a damaged one."""
    return read_torch(folder / STATE) if (folder / STATE).exists() else None


@contextmanager
def told_disk(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes a TrainError that says what is still whole."""
    try:
        yield
    except OSError as exc:
        what = "the disk is full" if exc.errno in _DISK_FULL else f"cannot be written ({exc.strerror or exc})"
        whole = (folder / STATE).exists()
        kept = f"the last state in {folder / STATE} is whole" if whole else "nothing was saved yet"
        then = "go on with --resume" if whole else "begin again"
        raise TrainError(f"{folder}: {what}; {kept}: make room, and {then}") from exc


def digest(*modules: nn.Module) -> str:
    """SHA-256 over all tensors of the modules, in order of name."""
    whole = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            whole.update(name.encode())
            whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def _of_checkpoint(start: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = checkpoints.load(start)
    return dict(model.codec_config), dict(model.codec.state_dict())


def _of_part(start: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = sources.config_json(start)
    if config.get("model_type") == "mimi":
        return {"kind": "mimi"}, {}
    codec = parts.read_codec(start, config, None)
    expected = shapes_of(codecs.build(codec.config).state_dict())
    parts.refuse_misfits(start, expected, codec.state)
    return dict(codec.config), codec.state


def _objection(directory: Path) -> str:
    others = strangers(directory, {CONFIG, WEIGHTS})
    return f"also holds {first_few(others)}" if others else ""


def _saved(data: Any) -> bytes:
    """torch.save in memory: written by Python itself, a full disk is an OSError whatever torch makes of it."""
    whole = io.BytesIO()
    torch.save(data, whole)
    return whole.getvalue()
