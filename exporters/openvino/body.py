"""A Qwen2/Qwen3/Llama-type stack of transformer blocks -> a stateful OpenVINO model, built from the torch weights.

Keys and values are OpenVINO states in the form that its CPU plugin fuses with attention: ReadValue, Gather by
beam_idx, Concat, Assign. beam_idx [0, 0] makes two rows of one, [0] drops the second. Of the last block only what the
last position needs is computed, unless every position is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.body import DecoderStack
from edgeomni.exporters.openvino.graph import END, Graph, Value, ops

if TYPE_CHECKING:
    pass


def build(stack: DecoderStack) -> Graph:
    """The stack's model.

    Inputs: inputs_embeds float [B, S, D]; positions int64 [S]; mask float [1, 1, S, T], T = frames cached + S, 0 where
    a position may be seen and -inf where not; beam_idx int32 [B], which row of the states each row goes on from.
    Outputs: hidden float [B, 1, D] (normed, last position), and body_out where asked for.
    """
    return _Builder(stack).build()


class _Builder:
    def __init__(self, stack: DecoderStack) -> None:
        self.stack, self.body = stack, stack.body
        self.graph = g = Graph(stack.name)
        self.x = g.input("inputs_embeds", np.float32, [-1, -1, stack.body.width])
        positions = g.input("positions", np.int64, [-1])
        self.mask = g.input("mask", np.float32, [1, 1, -1, -1])
        self.beams = g.input("beam_idx", np.int32, [-1])
        self.cos, self.sin = (self._rotation(part, positions) for part in ("cos", "sin"))
        batch = ops.gather(ops.shape_of(self.x), g.ints(0), g.number_int(0))
        shape = ops.concat([batch, g.ints(self.body.kv_heads), g.ints(0), g.ints(self.body.head_dim)], 0)
        self.empty = ops.broadcast(g.number(0), shape)

    def build(self) -> Graph:
        layers, x = self.stack.layers, self.x
        for i in range(layers):
            x = self._block(i, x, cut=i == layers - 1 and not self.stack.every_position)
        if self.stack.every_position:
            self.graph.output("body_out", x)
            x = self._last(x)
        self.graph.output("hidden", self._norm(x, "norm"))
        return self.graph

    def _rotation(self, part: str, positions: Value) -> Value:
        """Rotary cosines or sines [1, 1, S, head_dim] of these positions, alike in both halves of a head."""
        half = self.stack.rope.cos if part == "cos" else self.stack.rope.sin
        rows = ops.gather(self.graph.const(half, f"rope.{part}"), positions, self.graph.number_int(0))
        return ops.unsqueeze(ops.concat([rows, rows], -1), self.graph.ints(0, 1))

    def _block(self, i: int, x: Value, cut: bool) -> Value:
        """One block. `cut` keeps only the last position once attention is done."""
        at = f"layers.{i}"
        q, k, v = self._projections(self._norm(x, f"{at}.input_layernorm"), at)
        attended = self._attention(q, self._cached(f"key.{i}", k), self._cached(f"value.{i}", v))
        if cut:
            attended, x = self._last(attended), self._last(x)
        x = ops.add(x, self._linear(attended, f"{at}.self_attn.o_proj"))
        both = self._linear(self._norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp.gate_up")
        gate, up = self.graph.split(both, [self.body.ffn, self.body.ffn], axis=2)
        return ops.add(x, self._linear(ops.multiply(ops.swish(gate), up), f"{at}.mlp.down_proj"))

    def _projections(self, x: Value, at: str) -> tuple[Value, Value, Value]:
        """Query, key (both with their positions) and value, [B, heads or kv_heads, S, head_dim] each."""
        body, g = self.body, self.graph
        counts = (body.heads, body.kv_heads, body.kv_heads)
        parts = g.split(self._linear(x, f"{at}.self_attn.qkv"), [n * body.head_dim for n in counts], axis=2)
        q, k, v = (g.heads(part, n, body.head_dim) for part, n in zip(parts, counts, strict=True))
        if body.qk_norm:
            q, k = (self._norm(x, f"{at}.self_attn.{n}_norm") for x, n in ((q, "q"), (k, "k")))
        return self._rotated(q), self._rotated(k), v

    def _rotated(self, x: Value) -> Value:
        """x * cos + (the second half negated before the first) * sin, as arXiv 2104.09864 in Llama's order."""
        half = self.body.head_dim // 2
        first, second = self.graph.split(x, [half, half], axis=3)
        turned = ops.concat([ops.multiply(second, self.graph.number(-1)), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def _cached(self, name: str, new: Value) -> Value:
        """What the state holds for these rows with `new` behind it, which the state then keeps."""
        g, body = self.graph, self.body
        full = f"{self.stack.name}.{name}"
        past = g.state(full, self.empty, [-1, body.kv_heads, -1, body.head_dim])
        present = ops.concat([ops.gather(past, self.beams, g.number_int(0)), new], 2)
        g.assign(full, present)
        return present

    def _attention(self, q: Value, k: Value, v: Value) -> Value:
        g, body = self.graph, self.body
        if body.heads != body.kv_heads:
            k, v = (g.repeated(part, body.kv_heads, body.heads, body.head_dim) for part in (k, v))
        attended = ops.scaled_dot_product_attention(q, k, v, self.mask)
        return g.joined(attended, body.heads * body.head_dim)

    def _linear(self, x: Value, name: str) -> Value:
        full = f"{self.stack.name}.{name}"
        return self.graph.linear(x, full, *self.stack.weights.linear(full))

    def _norm(self, x: Value, name: str) -> Value:
        full = f"{self.stack.name}.{name}.weight"
        return self.graph.rms_norm(x, self._array(full), full, self.body.norm_eps)

    def _array(self, name: str) -> F32:
        return self.stack.weights.array(name)

    def _last(self, x: Value) -> Value:
        return self.graph.slice(x, self.graph.ints(-1), self.graph.ints(END), axis=1)
