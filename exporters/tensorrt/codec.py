"""Codec decoder -> one graph for TensorRT that is fed piece by piece, with states of fixed size (codec_builder.py).

N latents go in, N * hop samples come out, `lag_samples` behind. Inputs: codes.<level> int64 [N / stride], pushed int64
[1] (latents before this push), total int64 [1] (latents of the whole answer, or more than any while it is not known),
noise.<block> [1, 1, N * scale], state.<layer>. Outputs: wave [1, 1, N * hop], next.<layer>.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgeomni.exporters.onnx.graph import FLOAT, Graph
from edgeomni.exporters.tensorrt.codec_builder import StaticBuilder
from edgeomni.exporters.tensorrt.codec_layers import StaticLayers
from edgeomni.exporters.tensorrt.made import Made, Recipe, compute_type
from edgeomni.exporters.tensorrt.operators import OPSET, TensorRtOperators
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.exporters.tensorrt.precisions import schemes_for
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import read_plan
from edgeomni.static_codec import Sizes, sizes_of

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


def make(model: OmniModel, precision: str, options: TensorRtOptions, inputs: Mapping[str, float] | None = None) -> Made:
    """The graph "codec", and what a runtime must feed to it. Nothing of it has measured `inputs`."""
    schemes = schemes_for("codec", precision, options)
    plan = read_plan(model.codec, model.spec.codec)
    graph, meta = build(plan, compute=compute_type(precision))
    return Made({"codec": graph}, schemes, {"codec": _recipe(plan, meta)}, meta)


def build(plan: CodecPlan, *, compute: int) -> tuple[Graph, dict[str, Any]]:
    """The graph of a codec's layers, and the component's meta."""
    sizes = sizes_of(plan.spec, plan.first_push, plan.push_multiple, plan.lag_samples)
    builder = StaticBuilder(TensorRtOperators(Graph("codec", OPSET), compute=compute), sizes.largest * plan.spec.hop)
    wave = StaticLayers(builder, plan).run()
    builder.graph.output("wave", FLOAT, [1, 1, "samples"], wave)
    return builder.graph, {
        "first_push": plan.first_push,
        "push_multiple": plan.push_multiple,
        "lag_samples": plan.lag_samples,
        "states": builder.states,
        "noise": [asdict(pace) for pace in plan.noise_paces],
        "largest_push": sizes.largest,
    }


def _recipe(plan: CodecPlan, meta: dict[str, Any]) -> Recipe:
    sizes: Sizes = sizes_of(plan.spec, plan.first_push, plan.push_multiple, plan.lag_samples)
    pushes = (sizes.unit, sizes.usual, sizes.largest)
    profile = {f"codes.{i}": [[n // stride] for n in pushes] for i, stride in enumerate(plan.spec.vq_strides)}
    for i, pace in enumerate(meta["noise"]):
        profile[f"noise.{i}"] = [[1, 1, n * pace["scale"]] for n in pushes]
    return Recipe([profile])
