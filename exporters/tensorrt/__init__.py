"""Torch components -> ONNX graphs that TensorRT takes, and engines of them for the GPUs asked for.

The graphs are always shipped: the gate and the fallback run them on ONNX Runtime, and a device whose GPU cannot be
built for here builds its engines from them. TensorRT is imported in a child process only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeomni.bundle import Component
from edgeomni.exporters.tensorrt.options import TensorRtOptions as Options
from edgeomni.exporters.tensorrt.precisions import PRECISIONS, schemes_for

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

__all__ = ["PRECISIONS", "Options", "schemes_for", "write"]


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
