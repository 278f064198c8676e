"""Torch components -> OpenVINO models (.xml and .bin), each by the builder of its kind."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgeomni.bundle import Component
from edgeomni.exporters.openvino.options import OpenVinoOptions as Options
from edgeomni.exporters.openvino.precisions import PRECISIONS, schemes_for

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
    """The component's files in `directory`; see Exporter.export."""
    builder = import_module(f".{component}", __package__)
    return cast(Component, builder.export(model, directory, root, precision, options))
