"""A Qwen2/Qwen3/Llama-type stack of transformer blocks -> ONNX graph, built directly from the torch weights.

Of the last block only what the last position needs is computed, unless every position is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgeomni.arrays import F32
from edgeomni.errors import ExportError
from edgeomni.exporters.onnx.attention import GQA_HEAD_MULTIPLE, Attention, GroupQuery, Rope, Scatter
from edgeomni.exporters.onnx.graph import FLOAT, Graph
from edgeomni.exporters.onnx.kernels import FusedKernels, PortableKernels
from edgeomni.quantize.schemes import Packed, Scheme, quantize
from edgeomni.spec import BodySpec

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_TO_END = 2**31 - 1


class Weights:
    """The model's tensors as numpy, float32, one at a time; linears quantized as the plan says."""

    def __init__(self, model: OmniModel, schemes: Mapping[str, Scheme]) -> None:
        self._tensors: dict[str, Any] = dict(model.named_parameters())
        self._schemes = schemes

    def array(self, name: str) -> F32:
        return cast(F32, np.ascontiguousarray(self._tensors[name].detach().cpu().float().numpy()))

    def linear(self, names: Sequence[str], group: str) -> tuple[Packed, F32 | None]:
        """Rows of several linears joined into one, quantized by the group's scheme, and their joined bias."""
        rows = np.concatenate([self.array(f"{n}.weight") for n in names])
        biased = [f"{n}.bias" in self._tensors for n in names]
        bias = np.concatenate([self.array(f"{n}.bias") for n in names]) if all(biased) else None
        if any(biased) and bias is None:
            raise ExportError(f"{', '.join(names)}: only some have a bias, so they cannot be packed into one")
        return quantize(rows, self._schemes[group]), bias


@dataclass(frozen=True)
class Stack:
    """What to build: `name` ("body" or "tts") is the parameters' prefix, `layers` the number of blocks."""

    name: str
    layers: int
    body: BodySpec
    rope: Rope
    weights: Weights
    every_position: bool = False
    """Also put out "body_out" [B, S, D], un-normed, of all positions."""


def build(stack: Stack, flavour: str) -> tuple[Graph, str]:
    """The stack's graph, and the name of its attention ("gqa" or "scatter"), which says what inputs it has.

    Inputs: inputs_embeds float [B, S, D], the attention's own, past_key.{l} / past_value.{l} float
    [B, kv_heads, M, head_dim]. Outputs: hidden float [B, 1, D] (normed, last position), present_key.{l} /
    present_value.{l} (the caches; bind them to the past's buffers), and body_out where asked for.
    """
    return _Builder(stack, flavour).build()


class _Builder:
    def __init__(self, stack: Stack, flavour: str) -> None:
        self.stack, self.body = stack, stack.body
        fused = flavour == "ort" and stack.body.head_dim % GQA_HEAD_MULTIPLE == 0
        self.graph = g = Graph(stack.name, opset=21 if fused else 24)
        self.kernels = (FusedKernels if flavour == "ort" else PortableKernels)(g, stack.body.norm_eps)
        self.x = g.input("inputs_embeds", FLOAT, ["B", "S", stack.body.width])
        g.output("hidden", FLOAT, ["B", 1, stack.body.width])
        if stack.every_position:
            g.output("body_out", FLOAT, ["B", "S", stack.body.width])
        self.attention: Attention = (GroupQuery if fused else Scatter)(g, stack.body, stack.rope)
        self.attention.declare()

    def build(self) -> tuple[Graph, str]:
        layers = self.stack.layers
        normed, residual = self.kernels.norm(self.x, *self._gain("layers.0.input_layernorm")), self.x
        for i in range(layers):
            last = i == layers - 1
            after = "norm" if last else f"layers.{i + 1}.input_layernorm"
            normed, residual = self._block(i, normed, residual, after, cut=last and not self.stack.every_position)
        if self.stack.every_position:
            self.graph.op("Identity", [residual], outputs=["body_out"])
            normed = self._last(normed)
        self.graph.op("Identity", [normed], outputs=["hidden"])
        return self.graph, self.attention.name

    def _block(self, i: int, normed: str, residual: str, after: str, cut: bool) -> tuple[str, str]:
        """One block, and the norm that follows it. `cut` keeps only the last position once attention is done."""
        at = f"layers.{i}"
        qkv = self._linear(normed, f"{at}.self_attn.qkv", [f"{at}.self_attn.{p}_proj" for p in "qkv"])
        a = self.attention(qkv, i, self._head_norms(at), f"{self.stack.name}.{at}.self_attn")
        if cut:
            a, residual = self._last(a), self._last(residual)
        a = self._linear(a, f"{at}.self_attn.o_proj", [f"{at}.self_attn.o_proj"])
        normed, residual = self.kernels.add_norm(a, residual, *self._gain(f"{at}.post_attention_layernorm"))
        both = self._linear(normed, f"{at}.mlp.gate_up", [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"])
        gate, up = self.graph.op("Split", [both, self.graph.ints(self.body.ffn, self.body.ffn)], n_out=2, axis=-1)
        product = self.graph.op("Mul", [self.kernels.silu(gate), up])
        down = self._linear(product, f"{at}.mlp.down_proj", [f"{at}.mlp.down_proj"])
        return self.kernels.add_norm(down, residual, *self._gain(after))

    def _linear(self, x: str, name: str, parts: Sequence[str]) -> str:
        prefix = self.stack.name
        weight, bias = self.stack.weights.linear([f"{prefix}.{p}" for p in parts], f"{prefix}.linear")
        return self.kernels.linear(x, f"{prefix}.{name}", weight, bias)

    def _gain(self, name: str) -> tuple[F32, str]:
        full = f"{self.stack.name}.{name}.weight"
        return self.stack.weights.array(full), full

    def _head_norms(self, at: str) -> tuple[F32, F32] | None:
        if not self.body.qk_norm:
            return None
        array, prefix = self.stack.weights.array, f"{self.stack.name}.{at}.self_attn"
        return array(f"{prefix}.q_norm.weight"), array(f"{prefix}.k_norm.weight")

    def _last(self, x: str) -> str:
        g = self.graph
        return str(g.op("Slice", [x, g.ints(-1), g.ints(_TO_END), g.ints(1)]))
