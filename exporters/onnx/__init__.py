"""Torch components -> ONNX graphs with external data, each by the builder of its kind.

See edgeomni/exporters/__init__.py for what these names promise. torch and onnx are imported when a function is called.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgeomni.bundle import Component
from edgeomni.exporters.onnx.options import OnnxOptions
from edgeomni.exporters.onnx.precisions import PRECISIONS, schemes_for
from edgeomni.quantize.policy import groups_of

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = ["PRECISIONS", "OnnxOptions", "Options", "altered", "export", "schemes_for"]

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
