"""Every checkpoint source -> one OmniModel, and EdgeOmni's own directory: config.json + model.safetensors.

Directory kinds, told apart by content: "edgeomni" (our own, saved whole), "mini-omni" (the released layout),
"parts" (encoder/, llm/ and codec/ as transformers and SNAC save them), "preset" (a recipe for random weights).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, SpecError, UsageError
from ..sampling import check_seed
from ..spec import OmniSpec
from . import codecs, mini_omni, presets
from .compose import compose
from .omni import OmniModel, fill, skeleton
from .presets import preset
from .tensors import (
    differences,
    digest,
    read_safetensors,
    read_text,
    refuse,
    refuse_deeper,
    refuse_unusable,
    shapes_of,
    translated,
)

logger = logging.getLogger("edgeomni")

__all__ = ["compose", "kind_of", "load", "preset", "save", "save_preset"]

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FORMAT, VERSION = "edgeomni-checkpoint", 1
PARTS = ("encoder", "llm", "codec")


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """ "edgeomni", "mini-omni", "parts" or "preset"; None for anything else."""
    directory = Path(path)
    if not directory.is_dir():
        return None
    config = _peek(directory / CONFIG)
    if config.get("format") == FORMAT:
        return "preset" if "preset" in config else "edgeomni"
    if mini_omni.is_layout(directory):
        return "mini-omni"
    return "parts" if all((directory / part / CONFIG).is_file() for part in PARTS) else None


def load(source: str | os.PathLike[str], *, device: str = "cpu") -> OmniModel:
    """A checkpoint directory of any kind -> OmniModel, float32, eval mode.

    Raises CheckpointError: no or unknown directory, missing files, damaged files, pickles that hold more than
    weights, and tensors that are missing, unexpected or mis-shaped (all named at once).
    """
    directory = Path(source)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory; make one with `edgeomni init`")
    kind = kind_of(directory)
    readers = {"edgeomni": _load_own, "mini-omni": mini_omni.load, "parts": _load_parts, "preset": _load_preset}
    if kind is None:
        raise CheckpointError(
            f"{directory}: no checkpoint layout that EdgeOmni knows: its own ({CONFIG} + {WEIGHTS}), the released "
            f"Mini-Omni files ({mini_omni.WEIGHTS}, {mini_omni.CONFIG}, ...), or parts in "
            f"{', '.join(p + '/' for p in PARTS)}; "
            "make one with `edgeomni init`"
        )
    try:
        return readers[kind](directory).to(device)
    except SpecError as exc:
        raise CheckpointError(f"{directory}: sizes that contradict each other: {exc}") from exc


def save(model: OmniModel, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Writes our own layout, whole or not at all. An existing path is refused with UsageError unless `force`."""
    state = {name: _unshared(t) for name, t in model.state_dict().items()}
    config = {
        "spec": model.spec.to_dict(),
        "codec": model.codec_config,
        "provenance": model.provenance,
        "licences": model.licences,
    }

    def write(target: Path) -> None:
        _write_config(target, config)
        save_file(state, target / WEIGHTS, metadata={"format": "pt"})
        (target / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        if model.tokenizer_json is not None:
            (target / TOKENIZER).write_text(model.tokenizer_json, encoding="utf-8")

    return _write_whole(Path(directory), write, force)


def save_preset(name: str, seed: int, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Writes a recipe of a few bytes instead of random weights; `load` makes the same model of it every time."""
    presets.check(name)
    check_seed(seed)
    return _write_whole(Path(directory), lambda target: _write_config(target, {"preset": name, "seed": seed}), force)


def _load_own(directory: Path) -> OmniModel:
    config = _own_config(directory / CONFIG)
    tensors, where = read_safetensors(directory / WEIGHTS), str(directory / WEIGHTS)
    with translated(f"{directory / CONFIG}: values that make no model"):
        spec = OmniSpec.from_dict(config["spec"])
        layers = {"body.layers": spec.body.layers, "encoder.layers": spec.encoder.layers, "tts_layers": spec.tts_layers}
        refuse_deeper(str(directory / CONFIG), {**layers, **codecs.depths(config["codec"])}, len(tensors))
        model = skeleton(spec, config["codec"])
    refuse(where, differences(shapes_of(model.state_dict()), shapes_of(tensors)))
    refuse_unusable(where, tensors)
    fill(model, tensors)
    tokenizer = directory / TOKENIZER
    model.tokenizer_json = read_text(tokenizer) if tokenizer.is_file() else None
    if limit := config["provenance"].get("limit"):
        logger.warning("%s", limit)
    hashed = [p for p in (directory / CONFIG, directory / WEIGHTS, tokenizer) if p.is_file()]
    model.provenance = {**config["provenance"], "source_hash": digest(hashed)}
    model.licences = dict(config["licences"])
    return model


def _load_parts(directory: Path) -> OmniModel:
    encoder, llm, codec = (str(directory / part) for part in PARTS)
    return compose(encoder, llm, codec)


def _load_preset(directory: Path) -> OmniModel:
    config = _peek(directory / CONFIG)
    try:
        return preset(config["preset"], config.get("seed", 0))
    except UsageError as exc:
        raise CheckpointError(f"{directory / CONFIG}: {exc}") from exc


def _own_config(path: Path) -> dict[str, Any]:
    config = _peek(path)
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: layout version {config.get('version')!r}, this EdgeOmni reads {VERSION}; make it again with "
            "`edgeomni init`"
        )
    needed = ("spec", "codec", "provenance", "licences")
    if missing := [key for key in needed if not isinstance(config.get(key), dict)]:
        raise CheckpointError(f"{path}: section(s) {', '.join(missing)} missing; copy the checkpoint again")
    return config


def _peek(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # not ours to judge: an unknown layout is reported as such
    return config if isinstance(config, dict) else {}


def _write_config(target: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=1, sort_keys=True)
    (target / CONFIG).write_text(text + "\n", encoding="utf-8")


def _write_whole(directory: Path, write: Any, force: bool) -> Path:
    """`write(temporary)` beside the target, then renamed into place; on any failure nothing is left behind."""
    if directory.exists() and not force:
        raise UsageError(f"{directory} exists; choose another path or overwrite it with --force")
    if directory.exists() and not _may_go(directory):
        raise UsageError(f"{directory} is no checkpoint, so --force does not overwrite it; remove it yourself")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        temporary.chmod(0o755)
        write(temporary)
        _swap(temporary, directory)
    except OSError as exc:
        raise CheckpointError(
            f"{directory}: could not be written ({exc}); free some space or choose another path"
        ) from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _may_go(directory: Path) -> bool:
    return directory.is_dir() and (kind_of(directory) is not None or not any(directory.iterdir()))


def _swap(temporary: Path, directory: Path) -> None:
    if not directory.exists():
        os.rename(temporary, directory)
        return
    old = directory.with_name(f"{temporary.name}.old")
    os.rename(directory, old)
    try:
        os.rename(temporary, directory)
    except OSError:
        os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _unshared(tensor: Tensor) -> Tensor:
    """safetensors refuses views of one storage under two names (the two heads of one released lm_head)."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
