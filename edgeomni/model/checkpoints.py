"""Every checkpoint source -> one OmniModel, and EdgeOmni's own directory: config.json + model.safetensors.

Directory kinds, told apart by content: "edgeomni" (our own, saved whole), "mini-omni" (the released layout),
"parts" (encoder/, llm/ and codec/ as transformers and SNAC save them), "preset" (a recipe for random weights), "run"
(the folder of a training run, which stands for the checkpoint in it).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, EdgeOmniError, SpecError, UsageError
from ..outputs import check_directory, first_few, new_directory, strangers
from ..sampling import check_seed
from ..schema import Source, parse_json, read_bytes
from ..shipped import found
from . import codecs, mini_omni, own_config, presets
from .compose import compose
from .omni import OmniModel, fill, skeleton
from .own_config import FORMAT, VERSION, OwnConfig
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
)

logger = logging.getLogger("edgeomni")

__all__ = ["check_target", "compose", "kind_of", "load", "preset", "save", "save_preset"]

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
PARTS = ("encoder", "llm", "codec")
RUN_CONFIG, RUN_CHECKPOINT = "config.toml", "checkpoint"
"""What tells the folder of a training run (train/run.py), and the trained checkpoint in it."""


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """ "edgeomni", "mini-omni", "parts", "preset" or "run"; None for anything else. Takes what `load` takes."""
    directory = Path(found(path, "checkpoint"))
    if not directory.is_dir():
        return None
    config = _peek(directory / CONFIG)
    if config.get("format") == FORMAT:
        return "preset" if "preset" in config else "edgeomni"
    if mini_omni.is_layout(directory):
        return "mini-omni"
    if (directory / RUN_CONFIG).is_file() and (directory / RUN_CHECKPOINT / CONFIG).is_file():
        return "run"
    return "parts" if all((directory / part / CONFIG).is_file() for part in PARTS) else None


def load(source: str | os.PathLike[str], *, device: str = "cpu") -> OmniModel:
    """A checkpoint directory of any kind, or a shipped model by name ("nano") -> OmniModel, float32, eval mode.

    Raises CheckpointError: no or unknown directory, missing files, damaged files, pickles that hold more than
    weights, and tensors that are missing, unexpected or mis-shaped (all named at once).
    """
    directory = Path(found(source, "checkpoint"))
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory; make one with `edgeomni init`")
    kind = kind_of(directory)
    readers = {
        "edgeomni": _load_own,
        "mini-omni": mini_omni.load,
        "parts": _load_parts,
        "preset": _load_preset,
        "run": _load_run,
    }
    if kind is None:
        if (directory / CONFIG).exists() and (directory / WEIGHTS).exists():
            _config_data(directory / CONFIG)  # raises where it is our own, but damaged
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


def save(model: OmniModel, directory: str | os.PathLike[str], *, force: bool = False, half: bool = False) -> Path:
    """Writes our own layout, whole or not at all; with `half`, weights as float16, which `load` makes float32 again.

    `force` allows to replace a checkpoint directory that EdgeOmni wrote. Raises UsageError for anything else that
    exists (see `check_target`), and CheckpointError for what the disk refuses and for weights beyond float16.
    """
    state = {name: _unshared(t) for name, t in model.state_dict().items()}
    if half:
        state = {name: _halved(name, t) for name, t in state.items()}
    config = {
        "spec": model.spec.to_dict(),
        "codec": model.codec_config,
        "provenance": model.provenance,
        "licences": model.licences,
    }

    def write(target: Path) -> None:
        _write_config(target, config)
        save_file(state, target / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(target / CONFIG, target / WEIGHTS)  # safetensors writes for the owner alone, whatever the umask
        if model.tokenizer_json is not None:
            (target / TOKENIZER).write_text(model.tokenizer_json, encoding="utf-8")

    return _write_whole(Path(directory), write, force)


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise CheckpointError(f"{name} holds weights beyond float16's 65504; write the checkpoint without --half")
    return half


def save_preset(name: str, seed: int, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Writes a recipe of a few bytes instead of random weights; `load` makes the same model of it every time.

    Its "spec" is there for readers: `load` goes by name and seed.
    """
    check_seed(seed)
    recipe = {"preset": name, "seed": seed, "spec": presets.spec_of(name).to_dict()}
    return _write_whole(Path(directory), lambda target: _write_config(target, recipe), force)


def _load_own(directory: Path) -> OmniModel:
    config = own_config.read(directory / CONFIG)
    if isinstance(config, own_config.RecipeConfig):  # the file changed since `kind_of` read it
        return preset(config.preset, config.seed)
    model, where = _own_skeleton(config, directory / WEIGHTS), str(directory / WEIGHTS)
    tensors = read_safetensors(directory / WEIGHTS)
    refuse(where, differences(shapes_of(model.state_dict()), shapes_of(tensors)))
    refuse_unusable(where, tensors)
    fill(model, tensors)
    tokenizer = directory / TOKENIZER
    model.tokenizer_json = read_text(tokenizer) if tokenizer.is_file() else None
    if limit := config.provenance.get("limit"):
        logger.warning("%s", limit)
    hashed = [p for p in (directory / CONFIG, directory / WEIGHTS, tokenizer) if p.is_file()]
    model.provenance = {**config.provenance, "source_hash": digest(hashed)}
    model.licences = dict(config.licences)
    return model


def _load_run(directory: Path) -> OmniModel:
    return _load_own(directory / RUN_CHECKPOINT)


def _load_parts(directory: Path) -> OmniModel:
    encoder, llm, codec = (str(directory / part) for part in PARTS)
    return compose(encoder, llm, codec)


def _load_preset(directory: Path) -> OmniModel:
    config = own_config.read(directory / CONFIG)
    assert isinstance(config, own_config.RecipeConfig)
    try:
        return preset(config.preset, config.seed)
    except UsageError as exc:
        raise CheckpointError(f"{directory / CONFIG}: {exc}") from exc


def _own_skeleton(config: OwnConfig, weights: Path) -> OmniModel:
    """The model without its weights. Its sizes are held against the weight file's header before anything is built."""
    stored = _stored_shapes(weights)
    layers = config.spec.encoder.layers + config.spec.body.layers + config.spec.tts_layers
    refuse_deeper(str(weights), {"number of layers": layers, **codecs.depths(config.codec)}, len(stored))
    try:
        _check_codec(config, weights, stored)
        model = skeleton(config.spec, config.codec)
    except EdgeOmniError as exc:
        if str(weights.parent) in str(exc):
            raise
        raise CheckpointError(f"{weights.with_name(CONFIG)}: {exc}") from exc
    except Exception as exc:  # transformers and snac raise whatever happens to them with a configuration out of joint
        raise CheckpointError(
            f"{weights.with_name(CONFIG)}: no model can be built of it ({type(exc).__name__}: {exc}); copy the "
            "checkpoint again"
        ) from exc
    refuse(str(weights), differences(shapes_of(model.state_dict()), stored))
    return model


def _check_codec(config: OwnConfig, weights: Path, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the codec's configuration fits the weight file and the spec."""
    with torch.device("meta"):
        shapes = shapes_of(codecs.build(config.codec).state_dict())
    expected = {f"codec.{name}": shape for name, shape in shapes.items()}
    refuse(str(weights), differences(expected, {n: s for n, s in stored.items() if n.startswith("codec.")}))
    if (given := codecs.spec_of(config.codec)) != config.spec.codec:
        raise CheckpointError(f"{weights.with_name(CONFIG)}: $.codec is {given}, $.spec.codec is {config.spec.codec}")


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes in the header of a safetensors file, the tensors left unread. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"{path}: damaged or truncated ({exc}); download or copy it again") from exc


def _peek(path: Path) -> dict[str, Any]:
    """A configuration that may be anyone's; {} where there is none that could be read."""
    try:
        return _config_data(path)
    except CheckpointError:
        return {}  # not ours to judge: an unknown layout is reported as such


def _config_data(path: Path) -> dict[str, Any]:
    source = Source(str(path), CheckpointError, "copy the checkpoint again")
    return parse_json(read_bytes(path, source), source)


def _write_config(target: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=1, sort_keys=True)
    (target / CONFIG).write_text(text + "\n", encoding="utf-8")


def check_target(directory: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raises UsageError where `save` would refuse to write.

    Without `force` that is wherever something exists; with it, whatever is neither an empty directory nor a
    checkpoint that EdgeOmni wrote, with nothing else in it.
    """
    check_directory(directory, _objection if force else None)


def _write_whole(directory: Path, write: Callable[[Path], None], force: bool) -> Path:
    """Has `write` fill a new directory, which gets its name when it is whole."""
    try:
        with new_directory(directory, _objection if force else None) as stage:
            write(stage)
    except OSError as exc:
        raise CheckpointError(
            f"{directory}: could not be written ({exc.strerror or exc}); free some space or choose another path"
        ) from exc
    return directory


def _objection(directory: Path) -> str:
    """Why --force must not replace a directory; "" for a checkpoint that `save` or `save_preset` wrote."""
    if kind_of(directory) not in ("edgeomni", "preset"):
        return "is no checkpoint that EdgeOmni wrote"
    others = strangers(directory, {CONFIG, WEIGHTS, TOKENIZER})
    return f"also holds {first_few(others)}, which EdgeOmni did not write" if others else ""


def _unshared(tensor: Tensor) -> Tensor:
    """safetensors refuses views of one storage under two names (the two heads of one released lm_head)."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
