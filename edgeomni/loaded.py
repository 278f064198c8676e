"""What sessions run on: bundles and checkpoints opened on their engines, and shared by the sessions of one Bundle."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import Bundle
from .components import Components, OpenOptions
from .engines import COMPONENTS, EngineChoice, wanted_engine
from .errors import CheckpointError, UsageError
from .overlap import OverlapChoice, OverlapMode
from .overlap_choice import fastest, remembered
from .spec import OmniSpec
from .text import Tokenizer
from .turn import Model

if TYPE_CHECKING:
    from .measured import Run
    from .runtimes import Opened
    from .runtimes.choice import Choice

logger = logging.getLogger("edgeomni")


@dataclass(frozen=True)
class Ask:
    """How a source is to be opened, as `Session.open` was told: see there. `device` None: what this machine has."""

    threads: int | None = None
    device: str | None = None
    engine: EngineChoice = None
    overlap: OverlapChoice = "auto"
    strict: bool = False

    @property
    def engine_key(self) -> object:
        return tuple(sorted(self.engine.items())) if isinstance(self.engine, Mapping) else self.engine


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, the way that each component runs (in words), and whether its codec computes beside its LLM."""

    model: Model
    ways: dict[str, str]
    overlap: OverlapMode
    measured: Run | None = field(default=None)
    """The profile of this machine by which the ways were chosen."""


@dataclass(frozen=True, eq=False)
class _Kept:
    model: Model
    opened: Opened


_cache: weakref.WeakKeyDictionary[Bundle, dict[tuple[object, ...], _Kept]] = weakref.WeakKeyDictionary()
"""Of each Bundle object, what is loaded for (options, engine, device)."""
_loading = threading.Lock()


def from_bundle(bundle: Bundle, ask: Ask) -> Loaded:
    """The bundle's components, opened now or shared with sessions that were opened alike.

    Raises UsageError and EngineError as `runtimes.chosen` and `runtimes.opened` do.
    """
    from . import runtimes

    options = OpenOptions(ask.threads)
    with _loading:
        cached = _cache.setdefault(bundle, {})
        choice = runtimes.chosen(bundle, ask.engine, ask.device, ask.threads)
        known = remembered(bundle, options, choice.first) if ask.overlap == "auto" else ask.overlap
        beside, asked = replace(options, side_by_side=True), (ask.engine_key, ask.device)
        if known != "off" or (ask.overlap == "auto" and (beside, *asked) in cached):
            options = beside
        if (key := (options, *asked)) not in cached:
            cached[key] = _opened(bundle, choice, options, ask.strict)
        kept = cached[key]
        if ask.strict:
            runtimes.refuse(kept.opened.steps)
        mode = known or fastest(bundle, kept.opened.components, options, kept.opened.ways)
    ways = {name: way.label for name, way in kept.opened.ways.items()}
    for name, label in ways.items():
        logger.info("%s runs on %s", name, label)
    if choice.measured:
        logger.info("so chosen by the profile of %s: %s", choice.measured.date, choice.measured.words)
    return Loaded(kept.model, ways, mode, choice.measured)


def from_checkpoint(path: Path, ask: Ask) -> Loaded:
    """A checkpoint on the torch reference, which stays on the CPU unless another device is asked for.

    Raises UsageError for another engine, CheckpointError, and EngineError for a device that is not there.
    """
    wanted = [wanted_engine(ask.engine, name) for name in COMPONENTS]
    if others := [engine.name for engine in wanted if engine is not None and engine.name != "torch"]:
        raise UsageError(f"{path} is a checkpoint, which runs on torch; export it to run it on {others[0]}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such bundle or checkpoint directory")
    from .model import checkpoints
    from .runtimes.torch import components_of

    options = OpenOptions(ask.threads, "cpu" if ask.device in (None, "auto") else str(ask.device))
    model = checkpoints.load(path)
    components = components_of(model, options)
    label = f"torch on {options.device} (checkpoint:fp32)"
    logger.info("all components run on %s", label)
    owned = _owned(components, model.spec, model.tokenizer_json)
    return Loaded(owned, dict.fromkeys(COMPONENTS, label), "off" if ask.overlap == "auto" else ask.overlap)


def _opened(bundle: Bundle, choice: Choice, options: OpenOptions, strict: bool) -> _Kept:
    from . import runtimes

    opened = runtimes.opened(bundle, choice, options, strict)
    tokenizer = bundle.manifest.tokenizer
    text = bundle.file(tokenizer.path).read_text(encoding="utf-8") if tokenizer else None
    return _Kept(_owned(opened.components, bundle.spec, text), opened)


def _owned(components: Components, spec: OmniSpec, tokenizer_json: str | None) -> Model:
    """A model whose components are closed when nobody refers to it any more: no session, turn or Bundle."""
    model = Model(components, spec, Tokenizer(tokenizer_json, spec.layout))
    weakref.finalize(model, components.close).atexit = False
    return model
