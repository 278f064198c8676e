"""What a part's builder gives: graphs, the schemes of their weights, the recipes of their engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeomni.exporters.onnx.graph import BFLOAT16, FLOAT, FLOAT16, Graph
from edgeomni.quantize.schemes import Scheme
from edgeomni.tensorrt_builder import Recipe

__all__ = ["Made", "Recipe", "compute_type", "scales_meta"]


@dataclass(frozen=True)
class Made:
    """Graphs by role, tensor group -> scheme, how each graph's engine is built, and what else a runtime must know."""

    graphs: dict[str, Graph]
    schemes: dict[str, Scheme]
    recipes: dict[str, Recipe]
    meta: dict[str, Any]


def compute_type(precision: str) -> int:
    """The ONNX type that products, convolutions and attention compute in."""
    return {"fp32": FLOAT, "bf16": BFLOAT16}.get(precision, FLOAT16)


def scales_meta(inputs: Mapping[str, float]) -> dict[str, Any]:
    """The part of a component's meta that tells the scales of its linear layers' inputs; empty where there are none."""
    return {"input_scales": dict(inputs)} if inputs else {}
