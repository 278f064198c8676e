"""An adapter and the checkpoint that it was trained on -> one plain checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import TrainError, UsageError
from ..model import checkpoints
from ..model.omni import OmniModel
from ..spec import OmniSpec
from .adapters import load_adapter, merged, read_origin
from .config import LossConfig
from .run import RunFolder, is_run, stored_config
from .trainable import TrainableOmni


def merge(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Merges RUN, or an adapter's folder, into a checkpoint at `out`.

    `base`: the checkpoint that it was trained on, None for the one that the run names. Raises UsageError for a source
    without an adapter or an `out` that exists, TrainError for an adapter that was trained on another checkpoint (told
    by its hash), CheckpointError for a base that cannot be read.
    """
    checkpoints.check_target(out, force=force)
    return checkpoints.save(merged_model(Path(source), base), out, force=force)


def merged_model(source: Path, base: str | os.PathLike[str] | None = None) -> OmniModel:
    """The same in memory."""
    adapter = _adapter_of(source)
    origin = read_origin(adapter)
    path = base or origin.get("checkpoint")
    if not path:
        raise UsageError(f"{adapter} does not say where its checkpoint lies; name it with --base")
    model = checkpoints.load(path)
    _check_base(adapter, origin, model, str(path))
    trained = merged(load_adapter(TrainableOmni(model, LossConfig()), adapter), model)
    trained.spec = OmniSpec.from_dict(origin["spec"])
    trained.provenance = dict(origin["trained"])
    return trained


def _adapter_of(source: Path) -> Path:
    if not is_run(source):
        return source
    folder = RunFolder(source)
    if not folder.adapter.is_dir() and not folder.checkpoint.is_dir():
        raise TrainError(f"{source} has no checkpoint yet; finish the run: edgeomni train -o {source} --resume")
    if not folder.adapter.is_dir():
        stage = stored_config(source).stage
        raise UsageError(
            f"{source}: stage {stage} of this run learned without LoRA, so that there is nothing to merge; its "
            f"{folder.checkpoint} is the trained checkpoint"
        )
    return folder.adapter


def _check_base(adapter: Path, origin: dict[str, Any], model: OmniModel, path: str) -> None:
    wanted, found = origin.get("base_hash"), model.provenance.get("source_hash")
    if wanted != found:
        raise TrainError(
            f"{adapter} was trained on a checkpoint with the hash {str(wanted)[:12]}, and {path} has "
            f"{str(found)[:12]}; give the checkpoint that it was trained on with --base"
        )
