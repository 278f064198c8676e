"""What a part's builder gives: graphs, the schemes of their weights, the recipes of their engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeomni.exporters.onnx.graph import Graph
from edgeomni.quantize.schemes import Scheme
from edgeomni.tensorrt_builder import Recipe

__all__ = ["Made", "Recipe", "is_half"]


@dataclass(frozen=True)
class Made:
    """Graphs by role, tensor group -> scheme, how each graph's engine is built, and what else a runtime must know."""

    graphs: dict[str, Graph]
    schemes: dict[str, Scheme]
    recipes: dict[str, Recipe]
    meta: dict[str, Any]


def is_half(precision: str) -> bool:
    """Whether products, convolutions and attention compute in half precision."""
    return precision != "fp32"
