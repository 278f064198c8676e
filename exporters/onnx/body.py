"""A Qwen2/Qwen3/Llama-type stack of transformer blocks -> ONNX graph, built directly from the torch weights.

Of the last block only what the last position needs is computed, unless every position is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.attention import CachedAttention, Rope, attention_for
from edgeomni.exporters.onnx.graph import FLOAT, Graph
from edgeomni.exporters.onnx.operators import Operators, operators_for
from edgeomni.exporters.onnx.options import Flavour
from edgeomni.exporters.onnx.weights import PackedWeights
from edgeomni.spec import BodySpec

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_TO_END = 2**31 - 1


@dataclass(frozen=True)
class DecoderStack:
    """What to build: `name` ("body" or "tts") is the parameters' prefix, `layers` the number of blocks."""

    name: str
    layers: int
    body: BodySpec
    rope: Rope
    weights: PackedWeights
    every_position: bool = False
    """Also put out "body_out" [B, S, D], un-normed, of all positions."""


def rope_of(model: OmniModel) -> Rope:
    """The rotary caches of the model's body over its whole context."""
    rotary = model.body.rotary_emb
    inverse_frequencies = rotary.inv_freq.float().cpu().numpy()
    return Rope.of(inverse_frequencies, float(rotary.attention_scaling), model.spec.context)


def build(stack: DecoderStack, flavour: Flavour) -> tuple[Graph, str]:
    """The stack's graph, and the name of its attention ("gqa" or "scatter"), which says what inputs it has.

    Inputs: inputs_embeds float [B, S, D], the attention's own, past_key.{l} / past_value.{l} float
    [B, kv_heads, M, head_dim]. Outputs: hidden float [B, 1, D] (normed, last position), present_key.{l} /
    present_value.{l} (the caches; bind them to the past's buffers), and body_out where asked for.
    """
    kind = attention_for(flavour, stack.body.head_dim)
    operators = operators_for(flavour, stack.name, kind.opset)
    return build_with(stack, operators, kind(operators.graph, stack.body, stack.rope)), kind.name


def build_with(stack: DecoderStack, operators: Operators, attention: CachedAttention) -> Graph:
    """As `build`, on the graph of `operators` and with the `attention` given, for formats that have their own."""
    return _Builder(stack, operators, attention).build()


class _Builder:
    def __init__(self, stack: DecoderStack, operators: Operators, attention: CachedAttention) -> None:
        self.stack, self.body = stack, stack.body
        self.operators, self.attention = operators, attention
        self.graph = g = operators.graph
        self.x = g.input("inputs_embeds", FLOAT, ["B", "S", stack.body.width])
        g.output("hidden", FLOAT, ["B", 1, stack.body.width])
        if stack.every_position:
            g.output("body_out", FLOAT, ["B", "S", stack.body.width])
        attention.declare()

    def build(self) -> Graph:
        layers = self.stack.layers
        gain, residual = self._gain("layers.0.input_layernorm"), self.x
        normed = self.operators.rms_norm(self.x, *gain, self.body.norm_eps)
        for i in range(layers):
            last = i == layers - 1
            after = "norm" if last else f"layers.{i + 1}.input_layernorm"
            normed, residual = self._block(i, normed, residual, after, cut=last and not self.stack.every_position)
        if self.stack.every_position:
            self.graph.op("Identity", [residual], output="body_out")
            normed = self._last(normed)
        self.graph.op("Identity", [normed], output="hidden")
        return self.graph

    def _block(self, i: int, normed: str, residual: str, after: str, cut: bool) -> tuple[str, str]:
        """One block, and the norm that follows it. `cut` keeps only the last position once attention is done."""
        g, at = self.graph, f"layers.{i}"
        qkv = self._linear(normed, f"{at}.self_attn.qkv")
        a = self.attention(qkv, i, self._head_norms(at), f"{self.stack.name}.{at}.self_attn")
        if cut:
            a, residual = self._last(a), self._last(residual)
        a = self._linear(a, f"{at}.self_attn.o_proj")
        normed, residual = self._add_norm(a, residual, f"{at}.post_attention_layernorm")
        both = self._linear(normed, f"{at}.mlp.gate_up")
        gate, up = g.ops("Split", [both, g.ints(self.body.ffn, self.body.ffn)], 2, axis=-1)
        product = g.op("Mul", [self.operators.silu(gate), up])
        return self._add_norm(self._linear(product, f"{at}.mlp.down_proj"), residual, after)

    def _linear(self, x: str, name: str) -> str:
        full = f"{self.stack.name}.{name}"
        return self.operators.linear(x, full, *self.stack.weights.linear(full))

    def _add_norm(self, x: str, residual: str, name: str) -> tuple[str, str]:
        return self.operators.add_rms_norm(x, residual, *self._gain(name), self.body.norm_eps)

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
        return g.op("Slice", [x, g.ints(-1), g.ints(_TO_END), g.ints(1)])
