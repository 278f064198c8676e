"""Torch components -> ONNX graphs with external data, each by the builder of its kind."""

from __future__ import annotations

from edgeomni.exporters.onnx.options import OnnxOptions as Options
from edgeomni.exporters.onnx.precisions import PRECISIONS, schemes_for

__all__ = ["PRECISIONS", "Options", "schemes_for"]
