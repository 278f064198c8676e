"""Torch components -> ONNX graphs that TensorRT takes, and engines of them for the GPUs asked for.

The graphs are always shipped: the gate and the fallback run them on ONNX Runtime, and a device whose GPU cannot be
built for here builds its engines from them. See edgeomni/exporters/__init__.py for what these names promise. torch and
onnx are imported when a function is called; TensorRT only in a child process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeomni.bundle import Component
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.exporters.tensorrt.precisions import PRECISIONS, schemes_for
from edgeomni.tensorrt_targets import TARGETS, built_anywhere

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = [
    "PRECISIONS",
    "TELLS_PROGRESS",
    "Options",
    "TensorRtOptions",
    "altered",
    "as_exported",
    "codec_as_exported",
    "export",
    "notes",
    "rounds_inputs",
    "schemes_for",
    "stored_schemes",
]

Options = TensorRtOptions
TELLS_PROGRESS = True


def export(
    model: OmniModel,
    component: str,
    out: Path,
    precision: str,
    options: TensorRtOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Component:
    """Writes `component`'s graphs, tables and engines into out/<component>/ and returns its manifest entry.

    Paths in the entry are relative to `out`. Raises UsageError for names that do not exist and for what a target does
    not compute, ExportError where TensorRT is missing, refuses a graph, crashes or lacks memory, and OSError for a
    directory that cannot be written.
    """
    schemes_for(component, precision, options)  # refuses an unknown name before a directory of that name is made
    from edgeomni.exporters.tensorrt import writing

    directory = out / component
    directory.mkdir(parents=True, exist_ok=True)
    return writing.write(model, component, directory, out, precision, options or TensorRtOptions(), progress)


def notes(components: Sequence[str], options: TensorRtOptions) -> list[str]:
    """What is to be said once about an export of `components`: which targets are left to the device."""
    here = built_anywhere(options.targets)
    elsewhere = [f"{name} ({TARGETS[name].examples})" for name in options.targets if name not in here]
    if not elsewhere:
        return []
    return [
        f"no TensorRT package builds for {', '.join(elsewhere)} without that GPU: of {', '.join(components)} the "
        "bundle holds verified graphs and the recipe, and the first run there builds the engines"
    ]


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of the component's stored tensors under `root` that differ from what quantizing `model`'s weights gives."""
    from edgeomni.exporters.tensorrt import reread

    return reread.altered(model, component, root)


def as_exported(
    model: OmniModel, component: Component, *, exact: bool, root: Path | None = None
) -> AbstractContextManager[None]:
    """Within the context `model`'s encoder or LLM computes as `component`'s graphs do, with `exact` in float32."""
    from edgeomni.exporters.tensorrt import imitation

    return imitation.as_exported(model, component, exact=exact)


def rounds_inputs(component: Component) -> bool:
    """Whether products take their inputs in half precision, so that the exact mode differs."""
    return component.precision != "fp32"


def codec_as_exported(model: OmniModel, component: Component) -> Any:
    """The codec decoder's CodecPlan holding its weights as stored; None where they are stored as they are."""
    from edgeomni.exporters.tensorrt import imitation

    return imitation.codec_as_exported(model, component)


def stored_schemes(component: Component) -> Mapping[str, Any]:
    """Tensor group -> Scheme, as the manifest states them."""
    from edgeomni.exporters.tensorrt import imitation

    return imitation.stored_schemes(component)
