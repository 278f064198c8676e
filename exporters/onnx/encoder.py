"""Whisper encoder (arXiv 2212.04356) and adapter -> one ONNX graph, mel [1, n_mels, t] -> features [1, t/2, D].

A question fills little of the padded window, and only its features are used: the fused graph takes their number as
`wanted`, and computes the last block's queries, its MLP and the adapter for those positions alone. The keys and
values of all positions stay, so that this is exact in float; at INT8 the kernels' dynamic ranges then span the wanted
positions only.

Convolutions stay float: quantizing them costs accuracy and saves 2 % of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeomni.arrays import F32
from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.graph import FLOAT, INT64, MS, Graph, signature
from edgeomni.exporters.onnx.kernels import dequantized
from edgeomni.exporters.onnx.reread import packed_parts
from edgeomni.quantize.policy import scheme_of, schemes_for
from edgeomni.quantize.schemes import Packed, Scheme, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_LAYER_NORM_EPS = 1e-5


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, flavour: str, block: int | None) -> Component:
    """Writes out_dir/encoder.onnx and its data. The fused flavour has the input `wanted` besides."""
    schemes = schemes_for("encoder", precision, block, signed=flavour == "portable")
    if model.spec.adapter.kind == "linear":
        del schemes["adapter.linear"]  # it has but one layer, proj
    parts = _Parts(model, schemes, flavour)
    graph = _Fused("encoder", 21, parts) if flavour == "ort" else _Portable("encoder", 24, parts)
    files = graph.build().save(out_dir / "encoder.onnx")
    path = files[0].relative_to(root).as_posix()
    return Component(
        name="encoder",
        engine="onnxruntime",
        format="onnx",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"encoder": GraphEntry(path, *signature(files[0]))},
        meta={"flavour": flavour},
        files=describe_files(root, files),
    )


class _Parts:
    """The model's tensors as numpy, linears packed and quantized on demand."""

    def __init__(self, model: OmniModel, schemes: Mapping[str, Scheme], flavour: str) -> None:
        self.spec, self.schemes, self.flavour = model.spec, schemes, flavour
        self._tensors = {n: p for n, p in model.state_dict().items() if n.startswith(("encoder.", "adapter."))}

    def array(self, name: str) -> F32:
        return np.ascontiguousarray(self._tensors[name].detach().cpu().float().numpy())

    def has(self, name: str) -> bool:
        return name in self._tensors

    def linear(self, name: str) -> tuple[Packed, F32 | None]:
        """Weight and bias of a packed linear; a part without bias (Whisper's k_proj) counts as zeros."""
        parts = packed_parts(name)
        weight = np.concatenate([self.array(f"{p}.weight") for p in parts])
        bias = [self.array(f"{p}.bias") if self.has(f"{p}.bias") else None for p in parts]
        scheme = scheme_of(f"{parts[0]}.weight", self.schemes) or Scheme("fp32")
        if all(b is None for b in bias):
            return quantize(weight, scheme), None
        rows = [len(self._tensors[f"{p}.weight"]) for p in parts]
        filled = [np.zeros(n, np.float32) if b is None else b for b, n in zip(bias, rows, strict=True)]
        return quantize(weight, scheme), np.concatenate(filled)


class _Fused(Graph):
    """ONNX Runtime's own operators: MultiHeadAttention, DynamicQuantizeMatMul, QuickGelu."""

    def __init__(self, name: str, opset: int, parts: _Parts) -> None:
        super().__init__(name, opset)
        self.parts, self.spec = parts, parts.spec
        self.wanted = self.input("wanted", INT64, [1])

    def build(self) -> Graph:
        x = self._positions(self._convolutions(self.input("mel", FLOAT, [1, self.spec.front_end.n_mels, "t"])))
        normed = self.norm(x, "encoder.layers.0.self_attn_layer_norm")
        for i in range(self.spec.encoder.layers):
            at = f"encoder.layers.{i}"
            last = i + 1 == self.spec.encoder.layers
            attended = self._attention(normed, at, cut=last)
            x, normed = self.add_norm(self.cut(x) if last else x, attended, f"{at}.final_layer_norm")
            after = "encoder.layer_norm" if last else f"encoder.layers.{i + 1}.self_attn_layer_norm"
            mlp = self.dense(self.gelu(self.dense(normed, f"{at}.fc1")), f"{at}.fc2")
            x, normed = self.add_norm(x, mlp, after)
        self.output("features", FLOAT, [1, "features", self.spec.body.width], self._adapter(normed))
        return self

    def _convolutions(self, mel: str) -> str:
        x = mel
        for name, stride in (("encoder.conv1", 1), ("encoder.conv2", 2)):
            tensors = [self.named(f"{name}.weight"), self.named(f"{name}.bias")]
            x = self.gelu(self.op("Conv", [x, *tensors], kernel_shape=[3], pads=[1, 1], strides=[stride]))
        return str(self.op("Transpose", [x], perm=[0, 2, 1]))

    def _positions(self, x: str) -> str:
        """Adds the first t/2 position embeddings."""
        frames = self.op("Shape", [x], start=1, end=2)
        table = self.named("encoder.embed_positions.weight")
        return str(self.op("Add", [x, self.op("Slice", [table, self.ints(0), frames, self.ints(0)])]))

    def _attention(self, x: str, at: str, cut: bool) -> str:
        """`cut` answers only the queries of the wanted positions."""
        query, *rest = self.op("Split", [self.dense(x, f"{at}.self_attn.qkv")], n_out=3, axis=-1, num_outputs=3)
        return self.dense(self.attend([self.cut(query) if cut else query, *rest]), f"{at}.self_attn.out_proj")

    def cut(self, x: str) -> str:
        """[1, t/2, n] -> [1, wanted, n]."""
        return str(self.op("Slice", [x, self.ints(0), self.wanted, self.ints(1)]))

    def _adapter(self, x: str) -> str:
        if self.spec.adapter.kind == "swiglu":
            gate, up = self.op("Split", [self.dense(x, "adapter.fc")], n_out=2, axis=-1, num_outputs=2)
            x = self.op("Mul", [self.silu(gate), up])
        return self.dense(x, "adapter.proj")

    def named(self, name: str) -> str:
        return self.const(self.parts.array(name), name)

    def dense(self, x: str, name: str) -> str:
        return self.linear(x, name, *self.parts.linear(name))

    def gelu(self, x: str) -> str:
        return str(self.op("Gelu", [x], domain=MS))

    def silu(self, x: str) -> str:
        return str(self.op("QuickGelu", [x], domain=MS, alpha=1.0))

    def attend(self, qkv: list[str]) -> str:
        return str(self.op("MultiHeadAttention", qkv, domain=MS, num_heads=self.spec.encoder.heads))

    def norm(self, x: str, name: str) -> str:
        weights = [self.named(f"{name}.weight"), self.named(f"{name}.bias")]
        return str(self.op("LayerNormalization", [x, *weights], axis=-1, epsilon=_LAYER_NORM_EPS))

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """(x + y, its layer norm). SkipLayerNormalization does both at once, but 5 times slower than the two."""
        total = str(self.op("Add", [x, y]))
        return total, self.norm(total, name)


class _Portable(_Fused):
    """The same graph in standard operators, without `wanted`; INT8 is DequantizeLinear on the weights."""

    def __init__(self, name: str, opset: int, parts: _Parts) -> None:
        Graph.__init__(self, name, opset)
        self.parts, self.spec = parts, parts.spec

    def cut(self, x: str) -> str:
        return x

    def dense(self, x: str, name: str) -> str:
        weight, bias = self.parts.linear(name)
        if weight.scales is None:
            return self.linear(x, name, weight, bias)
        y = str(self.op("MatMul", [x, self._dequantized(name, weight)]))
        return y if bias is None else str(self.op("Add", [y, self.const(bias, f"{name}.bias")]))

    def _dequantized(self, name: str, weight: Packed) -> str:
        if weight.scheme.blocked:
            return dequantized(self, name, weight, rows_first=False)
        assert weight.scales is not None
        codes = self.const(np.ascontiguousarray(weight.data.T), f"{name}.codes")
        return str(self.op("DequantizeLinear", [codes, self.const(weight.scales, f"{name}.scales")], axis=1))

    def gelu(self, x: str) -> str:
        return str(self.op("Gelu", [x]))

    def silu(self, x: str) -> str:
        return str(self.op("Swish", [x]))

    def attend(self, qkv: list[str]) -> str:
        heads = self.spec.encoder.heads
        return str(self.op("Attention", qkv, q_num_heads=heads, kv_num_heads=heads))
