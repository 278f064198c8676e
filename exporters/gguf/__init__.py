"""Torch components -> GGUF files for llama.cpp and ggml: the LLM (a headless body, heads), encoder, codec.

See edgeomni/exporters/__init__.py for what these names promise. torch and gguf are imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeomni.bundle import Component
from edgeomni.exporters.gguf.options import GgufOptions
from edgeomni.exporters.gguf.precisions import PRECISIONS, schemes_for

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = [
    "PRECISIONS",
    "GgufOptions",
    "Options",
    "altered",
    "as_exported",
    "codec_as_exported",
    "export",
    "rounds_inputs",
    "schemes_for",
    "stored_schemes",
]

Options = GgufOptions


def export(
    model: OmniModel, component: str, out: Path, precision: str, options: GgufOptions | None = None
) -> Component:
    """Writes `component` into out/<component>/ and returns its manifest entry.

    Paths in the entry are relative to `out`. Raises UsageError for names that do not exist and for models that
    llama.cpp cannot run, and OSError for a directory that cannot be written.
    """
    schemes_for(component, precision, options)  # refuses an unknown name before a directory of that name is made
    directory = out / component
    directory.mkdir(parents=True, exist_ok=True)
    if component != "llm":
        part = import_module(f".{component}", __package__)
        return cast(Component, part.export(model, directory, out, precision))
    from edgeomni.exporters.gguf import llm

    return llm.export(model, directory, out, precision, options or GgufOptions())


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of the component's stored tensors under `root` that differ from what quantizing `model`'s weights gives."""
    if component.name != "llm":
        part = import_module(f".{component.name}", __package__)
        return cast(list[str], part.altered(model, component, root))
    from edgeomni.exporters.gguf import reread

    return reread.altered(model, component, root)


def as_exported(
    model: OmniModel, component: Component, *, exact: bool, root: Path | None = None
) -> AbstractContextManager[None]:
    """Within the context `model`'s encoder or LLM computes as `component` does, with `exact` as in its exact mode."""
    from edgeomni.exporters.gguf import imitation

    return imitation.as_exported(model, component, exact=exact, root=root)


def rounds_inputs(component: Component) -> bool:
    """Whether the transformer blocks' kernels round their inputs, so that the exact mode differs."""
    from edgeomni.exporters.gguf import imitation

    return imitation.rounds_inputs(component)


def codec_as_exported(model: OmniModel, component: Component) -> Any:
    """The codec decoder's CodecPlan holding its weights as stored; None where they are stored as they are."""
    from edgeomni.exporters.gguf import codec

    return codec.as_exported(model, component)


def stored_schemes(component: Component) -> Mapping[str, Any]:
    """Tensor group -> Scheme, as the manifest states them."""
    from edgeomni.exporters.gguf import imitation

    return imitation.stored_schemes(component)
