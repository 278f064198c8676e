"""Torch components -> OpenVINO models (.xml and .bin), each by the builder of its kind."""

from __future__ import annotations

from edgeomni.exporters.openvino.options import OpenVinoOptions as Options
from edgeomni.exporters.openvino.precisions import PRECISIONS, schemes_for

__all__ = ["PRECISIONS", "Options", "schemes_for"]
