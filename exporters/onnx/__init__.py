"""Torch components -> ONNX graphs with external data, each by the builder of its kind.

See edgeomni/exporters/__init__.py for what these names promise. torch and onnx are imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeomni.bundle import Component
from edgeomni.exporters.onnx.options import OnnxOptions
from edgeomni.exporters.onnx.precisions import PRECISIONS, schemes_for
from edgeomni.quantize.policy import groups_of

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = [
    "PRECISIONS",
    "OnnxOptions",
    "Options",
    "altered",
    "as_exported",
    "codec_as_exported",
    "export",
    "rounds_inputs",
    "schemes_for",
    "stored_schemes",
]

Options = OnnxOptions


def export(
    model: OmniModel, component: str, out: Path, precision: str, options: OnnxOptions | None = None
) -> Component:
    """Writes `component` (encoder, llm or codec) into out/<component>/ and returns its manifest entry.

    Paths in the entry are relative to `out`. Raises UsageError for names that do not exist, and OSError for a
    directory that cannot be written.
    """
    groups_of(component)  # refuses an unknown name before a directory of that name is made
    directory = out / component
    directory.mkdir(parents=True, exist_ok=True)
    builder = import_module(f".{component}", __package__)
    return cast(Component, builder.export(model, directory, out, precision, options or OnnxOptions()))


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of the component's stored tensors under `root` that differ from what quantizing `model`'s weights gives."""
    from edgeomni.exporters.onnx import reread

    return reread.altered(model, component, root)


def as_exported(
    model: OmniModel, component: Component, *, exact: bool, root: Path | None = None
) -> AbstractContextManager[None]:
    """Within the context `model`'s encoder or LLM computes as `component`'s graphs do."""
    from edgeomni.exporters.onnx import imitation

    return imitation.as_exported(model, component, exact=exact)


def rounds_inputs(component: Component) -> bool:
    """Whether the transformer blocks' kernels round their inputs, so that the exact mode differs."""
    from edgeomni.exporters.onnx import imitation

    return imitation.rounds_inputs(component)


def codec_as_exported(model: OmniModel, component: Component) -> Any:
    """The codec decoder's CodecPlan holding its weights as stored; None where they are stored as they are."""
    from edgeomni.exporters.onnx import imitation

    return imitation.codec_as_exported(model, component)


def stored_schemes(component: Component) -> Mapping[str, Any]:
    """Tensor group -> Scheme, as the manifest states them."""
    from edgeomni.exporters.onnx import imitation

    return imitation.stored_schemes(component)
