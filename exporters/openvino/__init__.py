"""Torch components -> OpenVINO models (.xml and .bin), each by the builder of its kind.

See edgeomni/exporters/__init__.py for what these names promise. torch and OpenVINO are imported when a function is
called.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeomni.bundle import Component
from edgeomni.exporters.openvino.options import OpenVinoOptions
from edgeomni.exporters.openvino.precisions import PRECISIONS, schemes_for

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = [
    "PRECISIONS",
    "OpenVinoOptions",
    "Options",
    "altered",
    "as_exported",
    "codec_as_exported",
    "export",
    "rounds_inputs",
    "schemes_for",
    "stored_schemes",
]

Options = OpenVinoOptions


def export(
    model: OmniModel, component: str, out: Path, precision: str, options: OpenVinoOptions | None = None
) -> Component:
    """Writes `component` (encoder, llm or codec) into out/<component>/ and returns its manifest entry.

    Paths in the entry are relative to `out`. Raises UsageError for names that do not exist and for widths that no
    block of an integer precision divides, EngineError where OpenVINO is not installed, and OSError for a directory
    that cannot be written.
    """
    schemes_for(component, precision, options)  # refuses an unknown name before a directory of that name is made
    directory = out / component
    directory.mkdir(parents=True, exist_ok=True)
    builder = import_module(f".{component}", __package__)
    return cast(Component, builder.export(model, directory, out, precision, options or OpenVinoOptions()))


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of the component's stored tensors under `root` that differ from what quantizing `model`'s weights gives."""
    from edgeomni.exporters.openvino import reread

    return reread.altered(model, component, root)


def as_exported(
    model: OmniModel, component: Component, *, exact: bool, root: Path | None = None
) -> AbstractContextManager[None]:
    """Within the context `model`'s encoder or LLM computes as `component` does in exact mode."""
    from edgeomni.exporters.openvino import imitation

    return imitation.as_exported(model, component)


def rounds_inputs(component: Component) -> bool:
    """False: whether OpenVINO's kernels round their inputs is its plugin's choice, and not imitated (imitation.py)."""
    return False


def codec_as_exported(model: OmniModel, component: Component) -> Any:
    """The codec decoder's CodecPlan holding its weights as stored; None where they are stored as they are."""
    from edgeomni.exporters.openvino import imitation

    return imitation.codec_as_exported(model, component)


def stored_schemes(component: Component) -> Mapping[str, Any]:
    """Tensor group -> Scheme, as the manifest states them."""
    from edgeomni.exporters.openvino import imitation

    return imitation.stored_schemes(component)
