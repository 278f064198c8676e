"""Torch components -> ONNX graphs that TensorRT takes, and engines of them for the GPUs asked for.

The graphs are always shipped: the gate and the fallback run them on ONNX Runtime, and a device whose GPU cannot be
built for here builds its engines from them. TensorRT is imported in a child process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeomni.bundle import Component
from edgeomni.exporters.tensorrt.options import TensorRtOptions as Options
from edgeomni.exporters.tensorrt.precisions import PRECISIONS, schemes_for
from edgeomni.tensorrt_targets import TARGETS, built_anywhere

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = ["PRECISIONS", "Options", "notes", "schemes_for", "write"]


def write(
    model: OmniModel,
    component: str,
    directory: Path,
    root: Path,
    precision: str,
    options: Options,
    progress: Callable[[str], None],
) -> Component:
    """The component's graphs, tables and engines in `directory`; see Exporter.export.

    Raises UsageError for what a target does not compute, ExportError where TensorRT is missing, refuses a graph,
    crashes or lacks memory.
    """
    from edgeomni.exporters.tensorrt import writing

    return writing.write(model, component, directory, root, precision, options, progress)


def notes(components: Sequence[str], options: Options) -> list[str]:
    """What is to be said once about an export of `components`: which targets are left to the device."""
    here = built_anywhere(options.targets)
    elsewhere = [f"{name} ({TARGETS[name].examples})" for name in options.targets if name not in here]
    if not elsewhere:
        return []
    return [
        f"no TensorRT package builds for {', '.join(elsewhere)} without that GPU: of {', '.join(components)} the "
        "bundle holds verified graphs and the recipe, and the first run there builds the engines"
    ]
