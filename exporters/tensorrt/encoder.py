"""Whisper encoder (arXiv 2212.04356) and adapter -> one graph for TensorRT: mel [1, n_mels, t] -> features [1, t/2, D].

Convolutions and position embeddings are stored in half (bf16: in bfloat16) at every precision but fp32: quantizing them
costs accuracy and saves 2 % of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeomni.exporters.onnx.encoder import EncoderBuilder
from edgeomni.exporters.onnx.graph import Graph
from edgeomni.exporters.onnx.weights import PackedWeights
from edgeomni.exporters.tensorrt.input_ranges import input_scales
from edgeomni.exporters.tensorrt.made import Made, Recipe, compute_type, scales_meta
from edgeomni.exporters.tensorrt.operators import OPSET, TensorRtOperators
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.exporters.tensorrt.precisions import block_for, schemes_for

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_SHORTEST = 2
"""Mel frames of the shortest window: one feature."""


def make(model: OmniModel, precision: str, options: TensorRtOptions, inputs: Mapping[str, float] | None = None) -> Made:
    """The graph "encoder", the schemes of its weights, and the window sizes that its engine is built for.

    `inputs`: scales of linear layers' inputs that were measured before; None measures them where they are needed.
    """
    block = block_for("encoder", model.spec, options) if precision == "int8w" else None
    schemes = schemes_for("encoder", precision, options, block)
    if model.spec.adapter.kind == "linear":
        del schemes["adapter.linear"]  # it has but one layer, proj
    if inputs is None:
        inputs = input_scales(model, "encoder", schemes)
    operators = TensorRtOperators(Graph("encoder", OPSET), compute=compute_type(precision), inputs=inputs)
    builder = _Builder(operators, model.spec, PackedWeights.of(model, schemes))
    builder.build()
    full, mels = 2 * model.spec.encoder.context, model.spec.front_end.n_mels
    sizes = [[1, mels, t] for t in (_SHORTEST, full, full)]
    return Made({"encoder": builder.graph}, schemes, {"encoder": Recipe([{"mel": sizes}])}, scales_meta(inputs))


class _Builder(EncoderBuilder):
    def _convolutions(self, mel: str) -> str:
        operators, g, x = self.operators, self.graph, mel
        assert isinstance(operators, TensorRtOperators)
        for name, stride in (("encoder.conv1", 1), ("encoder.conv2", 2)):
            weight = operators.stored(self.weights.array(f"{name}.weight"), f"{name}.weight")
            inputs = [operators.to_narrow(x), weight]
            y = operators.to_float(g.op("Conv", inputs, kernel_shape=[3], pads=[1, 1], strides=[stride]))
            bias = g.const(self.weights.array(f"{name}.bias")[:, None], f"{name}.bias")
            x = operators.gelu(g.op("Add", [y, bias]))
        return g.op("Transpose", [x], perm=[0, 2, 1])

    def _positions(self, x: str) -> str:
        """As the base class does; the table is cut before it becomes float32, so that engines hold it narrow."""
        operators, g, name = self.operators, self.graph, "encoder.embed_positions.weight"
        assert isinstance(operators, TensorRtOperators)
        frames, table = g.op("Shape", [x], start=1, end=2), operators.stored(self.weights.array(name), name)
        return g.op("Add", [x, operators.to_float(g.op("Slice", [table, g.ints(0), frames, g.ints(0)]))])
