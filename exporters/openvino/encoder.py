"""Whisper encoder (arXiv 2212.04356) and adapter -> one OpenVINO model, mel [1, n_mels, t] -> features [1, wanted, D].

A question fills little of the padded window, and only its features are used: the last block's queries, its MLP and the
adapter are computed for the first `wanted` positions alone. The keys and values of all positions stay, so that this is
exact. Convolutions stay float, as in the ONNX format.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.weights import PackedWeights
from edgeomni.exporters.openvino import fast, files
from edgeomni.exporters.openvino.graph import Graph, Value, ops
from edgeomni.exporters.openvino.options import OpenVinoOptions
from edgeomni.exporters.openvino.precisions import fitted, schemes_for
from edgeomni.spec import OmniSpec

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_LAYER_NORM_EPS = 1e-5


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OpenVinoOptions) -> Component:
    """Writes out_dir/encoder.xml and its .bin. Inputs: mel float [1, n_mels, t], wanted int64 [1]."""
    schemes = fitted(schemes_for("encoder", precision, options), model.spec)
    if model.spec.adapter.kind == "linear":
        del schemes["adapter.linear"]  # it has but one layer, proj
    built = _Builder(model.spec, PackedWeights.of(model, schemes)).build().model()
    written = files.save(built, out_dir / "encoder.xml")
    return Component(
        name="encoder",
        engine="openvino",
        format="openvino",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"encoder": GraphEntry(written[0].relative_to(root).as_posix(), *files.signature(built))},
        meta=fast.meta(options.fast, schemes),
        files=describe_files(root, written),
    )


class _Builder:
    def __init__(self, spec: OmniSpec, weights: PackedWeights) -> None:
        self.spec, self.weights, self.graph = spec, weights, Graph("encoder")
        self.mel = self.graph.input("mel", np.float32, [1, spec.front_end.n_mels, -1])
        self.wanted = self.graph.input("wanted", np.int64, [1])

    def build(self) -> Graph:
        x = self._positions(self._convolutions(self.mel))
        for i in range(self.spec.encoder.layers):
            x = self._block(x, f"encoder.layers.{i}", cut=i + 1 == self.spec.encoder.layers)
        self.graph.output("features", self._adapter(self._norm(x, "encoder.layer_norm")))
        return self.graph

    def _block(self, x: Value, at: str, cut: bool) -> Value:
        """One block; `cut` goes on with the wanted positions only."""
        attended = self._attention(self._norm(x, f"{at}.self_attn_layer_norm"), at, cut)
        x = ops.add(self._cut(x, 1) if cut else x, attended)
        inner = self._linear(self._norm(x, f"{at}.final_layer_norm"), f"{at}.fc1")
        return ops.add(x, self._linear(ops.gelu(inner, "erf"), f"{at}.fc2"))

    def _convolutions(self, mel: Value) -> Value:
        x = mel
        for name, stride in (("encoder.conv1", 1), ("encoder.conv2", 2)):
            y = ops.convolution(x, self._named(f"{name}.weight"), [stride], [1], [1], [1])
            bias = self.weights.array(f"{name}.bias").reshape(1, -1, 1)
            x = ops.gelu(ops.add(y, self.graph.const(bias, f"{name}.bias")), "erf")
        return ops.transpose(x, self.graph.ints(0, 2, 1))

    def _positions(self, x: Value) -> Value:
        """Adds the first t/2 position embeddings."""
        g = self.graph
        frames = ops.gather(ops.shape_of(x), g.ints(1), g.number_int(0))
        return ops.add(x, g.slice(self._named("encoder.embed_positions.weight"), g.ints(0), frames, axis=0))

    def _attention(self, x: Value, at: str, cut: bool) -> Value:
        """Bidirectional attention; `cut` answers only the queries of the wanted positions."""
        spec = self.spec.encoder
        parts = self.graph.split(self._linear(x, f"{at}.self_attn.qkv"), [spec.width] * 3, axis=2)
        q, k, v = (self.graph.heads(part, spec.heads, spec.width // spec.heads) for part in parts)
        attended = ops.scaled_dot_product_attention(self._cut(q, 2) if cut else q, k, v)
        return self._linear(self.graph.joined(attended, spec.width), f"{at}.self_attn.out_proj")

    def _cut(self, x: Value, axis: int) -> Value:
        return self.graph.slice(x, self.graph.ints(0), self.wanted, axis)

    def _adapter(self, x: Value) -> Value:
        if self.spec.adapter.kind == "swiglu":
            gate, up = self.graph.split(self._linear(x, "adapter.fc"), [self.spec.adapter.hidden] * 2, axis=2)
            x = ops.multiply(ops.swish(gate), up)
        return self._linear(x, "adapter.proj")

    def _named(self, name: str) -> Value:
        return self.graph.const(self.weights.array(name), name)

    def _linear(self, x: Value, name: str) -> Value:
        return self.graph.linear(x, name, *self.weights.linear(name))

    def _norm(self, x: Value, name: str) -> Value:
        gain, bias = (self.weights.array(f"{name}.{part}") for part in ("weight", "bias"))
        return self.graph.layer_norm(x, gain, bias, name, _LAYER_NORM_EPS)
