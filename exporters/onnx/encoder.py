"""Whisper encoder (arXiv 2212.04356) and adapter -> one ONNX graph, mel [1, n_mels, t] -> features [1, t/2, D].

A question fills little of the padded window, and only its features are used: the fused graph takes their number as
`wanted`, and computes the last block's queries, its MLP and the adapter for those positions alone. The keys and
values of all positions stay, so that this is exact in float; at INT8 the kernels' dynamic ranges then span the wanted
positions only.

Convolutions stay float: quantizing them costs accuracy and saves 2 % of the bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.graph import FLOAT, INT64, signature
from edgeomni.exporters.onnx.operators import Operators, operators_for
from edgeomni.exporters.onnx.options import OnnxOptions
from edgeomni.exporters.onnx.precisions import schemes_for
from edgeomni.exporters.onnx.weights import PackedWeights
from edgeomni.spec import OmniSpec

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_LAYER_NORM_EPS = 1e-5


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OnnxOptions) -> Component:
    """Writes out_dir/encoder.onnx and its data. The fused flavour has the input `wanted` besides."""
    schemes = schemes_for("encoder", precision, options)
    if model.spec.adapter.kind == "linear":
        del schemes["adapter.linear"]  # it has but one layer, proj
    builder = EncoderBuilder(operators_for(options.flavour, "encoder"), model.spec, PackedWeights.of(model, schemes))
    builder.build()
    files = builder.graph.save(out_dir / "encoder.onnx")
    path = files[0].relative_to(root).as_posix()
    return Component(
        name="encoder",
        engine="onnxruntime",
        format="onnx",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"encoder": GraphEntry(path, *signature(files[0]))},
        meta={"flavour": options.flavour},
        files=describe_files(root, files),
    )


class EncoderBuilder:
    """Adds the encoder's layers to the graph of `operators`."""

    def __init__(self, operators: Operators, spec: OmniSpec, weights: PackedWeights) -> None:
        self.operators, self.graph = operators, operators.graph
        self.spec, self.weights = spec, weights
        self.wanted = self.graph.input("wanted", INT64, [1]) if operators.takes_wanted else None

    def build(self) -> None:
        x = self._positions(self._convolutions(self.graph.input("mel", FLOAT, [1, self.spec.front_end.n_mels, "t"])))
        normed = self._norm(x, "encoder.layers.0.self_attn_layer_norm")
        for i in range(self.spec.encoder.layers):
            at = f"encoder.layers.{i}"
            last = i + 1 == self.spec.encoder.layers
            attended = self._attention(normed, at, cut=last)
            x, normed = self._add_norm(self._cut(x) if last else x, attended, f"{at}.final_layer_norm")
            after = "encoder.layer_norm" if last else f"encoder.layers.{i + 1}.self_attn_layer_norm"
            mlp = self._linear(self.operators.gelu(self._linear(normed, f"{at}.fc1")), f"{at}.fc2")
            x, normed = self._add_norm(x, mlp, after)
        self.graph.output("features", FLOAT, [1, "features", self.spec.body.width], self._adapter(normed))

    def _convolutions(self, mel: str) -> str:
        x = mel
        for name, stride in (("encoder.conv1", 1), ("encoder.conv2", 2)):
            tensors = [self._named(f"{name}.weight"), self._named(f"{name}.bias")]
            y = self.graph.op("Conv", [x, *tensors], kernel_shape=[3], pads=[1, 1], strides=[stride])
            x = self.operators.gelu(y)
        return self.graph.op("Transpose", [x], perm=[0, 2, 1])

    def _positions(self, x: str) -> str:
        """Adds the first t/2 position embeddings."""
        g = self.graph
        frames = g.op("Shape", [x], start=1, end=2)
        table = self._named("encoder.embed_positions.weight")
        return g.op("Add", [x, g.op("Slice", [table, g.ints(0), frames, g.ints(0)])])

    def _attention(self, x: str, at: str, cut: bool) -> str:
        """`cut` answers only the queries of the wanted positions."""
        query, key, value = self.graph.split(self._linear(x, f"{at}.self_attn.qkv"), 3, axis=-1)
        query = self._cut(query) if cut else query
        attended = self.operators.attention(query, key, value, self.spec.encoder.heads)
        return self._linear(attended, f"{at}.self_attn.out_proj")

    def _cut(self, x: str) -> str:
        """[1, t/2, n] -> [1, wanted, n]; all positions where the graph is not told how many are wanted."""
        g = self.graph
        return x if self.wanted is None else g.op("Slice", [x, g.ints(0), self.wanted, g.ints(1)])

    def _adapter(self, x: str) -> str:
        if self.spec.adapter.kind == "swiglu":
            gate, up = self.graph.split(self._linear(x, "adapter.fc"), 2, axis=-1)
            x = self.graph.op("Mul", [self.operators.silu(gate), up])
        return self._linear(x, "adapter.proj")

    def _named(self, name: str) -> str:
        return self.graph.const(self.weights.array(name), name)

    def _linear(self, x: str, name: str) -> str:
        return self.operators.linear(x, name, *self.weights.linear(name))

    def _norm(self, x: str, name: str) -> str:
        tensors = [self._named(f"{name}.weight"), self._named(f"{name}.bias")]
        return self.graph.op("LayerNormalization", [x, *tensors], axis=-1, epsilon=_LAYER_NORM_EPS)

    def _add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """(x + y, its layer norm). SkipLayerNormalization does both at once, but takes 5 times as long as the two."""
        total = self.graph.op("Add", [x, y])
        return total, self._norm(total, name)
