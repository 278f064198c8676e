"""Whisper encoder (arXiv 2212.04356) and adapter -> one graph for TensorRT: mel [1, n_mels, t] -> features [1, t/2, D].

Convolutions are stored in half at every precision but fp32: quantizing them costs accuracy and saves 2 % of the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeomni.exporters.onnx.encoder import EncoderBuilder
from edgeomni.exporters.onnx.graph import Graph
from edgeomni.exporters.onnx.weights import PackedWeights
from edgeomni.exporters.tensorrt.made import Made, Recipe, is_half
from edgeomni.exporters.tensorrt.operators import OPSET, TensorRtOperators
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.exporters.tensorrt.precisions import block_for, schemes_for

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_SHORTEST = 2
"""Mel frames of the shortest window: one feature."""


def make(model: OmniModel, precision: str, options: TensorRtOptions) -> Made:
    """The graph "encoder", the schemes of its weights, and the window sizes that its engine is built for."""
    block = block_for("encoder", model.spec, options) if precision == "int8" else None
    schemes = schemes_for("encoder", precision, options, block)
    if model.spec.adapter.kind == "linear":
        del schemes["adapter.linear"]  # it has but one layer, proj
    operators = TensorRtOperators(Graph("encoder", OPSET), half=is_half(precision))
    builder = _Builder(operators, model.spec, PackedWeights.of(model, schemes))
    builder.build()
    full, mels = 2 * model.spec.encoder.context, model.spec.front_end.n_mels
    sizes = [[1, mels, t] for t in (_SHORTEST, full, full)]
    return Made({"encoder": builder.graph}, schemes, {"encoder": Recipe([{"mel": sizes}])}, {})


class _Builder(EncoderBuilder):
    def _convolutions(self, mel: str) -> str:
        operators, g, x = self.operators, self.graph, mel
        assert isinstance(operators, TensorRtOperators)
        for name, stride in (("encoder.conv1", 1), ("encoder.conv2", 2)):
            weight = operators.stored(self.weights.array(f"{name}.weight"), f"{name}.weight")
            inputs = [operators.to_half(x), weight]
            y = operators.to_float(g.op("Conv", inputs, kernel_shape=[3], pads=[1, 1], strides=[stride]))
            bias = g.const(self.weights.array(f"{name}.bias")[:, None], f"{name}.bias")
            x = operators.gelu(g.op("Add", [y, bias]))
        return g.op("Transpose", [x], perm=[0, 2, 1])
