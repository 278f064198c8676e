"""Rotary attention with a KV cache of fixed size, as TensorRT takes it.

TensorScatter becomes TensorRT's own cache update, which writes in place and wants the cache's length to be known when
the engine is built. Which keys a position sees is a mask computed from the positions: TensorRT-RTX 1.7's parser takes
Attention's input nonpad_kv_seqlen and then ignores it (its builder calls that input unused), and would attend to the
whole cache.
"""

from __future__ import annotations

import math

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.attention import CachedAttention, Rope
from edgeomni.exporters.onnx.graph import INT64, Dim
from edgeomni.exporters.tensorrt.operators import OPSET, TensorRtOperators
from edgeomni.spec import BodySpec


class StaticCache(CachedAttention):
    """Inputs position_ids int64 [B, S] and write_indices int64 [B] (frames cached so far), and the caches.

    Caches are [B, kv_heads, M, head_dim], M = the rotary caches' length, in the type that products compute in.
    """

    name = "static"
    opset = OPSET

    def __init__(self, operators: TensorRtOperators, body: BodySpec, rope: Rope) -> None:
        super().__init__(operators.graph, body, rope)
        self.operators, self.frames = operators, len(rope.cos)
        self._mask = ""

    def declare(self) -> None:
        g = self.graph
        g.input("position_ids", INT64, ["B", "S"])
        g.input("write_indices", INT64, ["B"])
        keys = g.const(np.arange(self.frames, dtype=np.int64), "attention.keys")
        positions = g.op("Unsqueeze", ["position_ids", g.ints(1, 3)])
        self._mask = g.op("GreaterOrEqual", [positions, keys])  # [B, 1, S, M]
        if not self.operators.narrow:
            seen, unseen = g.floats("attention.seen", 0.0), g.floats("attention.unseen", -np.inf)
            self._mask = g.op("Unsqueeze", [g.op("Where", [self._mask, seen, unseen]), g.ints(2)])  # [B, 1, 1, S, M]

    def __call__(self, qkv: str, layer: int, head_norms: tuple[F32, F32] | None, prefix: str) -> str:
        g, body = self.graph, self.body
        q, k, v = (self._heads(part) for part in self._split(qkv))
        if head_norms:
            names = (f"{prefix}.q_norm", f"{prefix}.k_norm")
            q, k = (self._normed(x, w, n) for x, w, n in zip((q, k), head_norms, names, strict=True))
        q, k = (g.op("RotaryEmbedding", [x, self.cos, self.sin, "position_ids"]) for x in (q, k))
        past, present = self._past(layer), self._present(layer)
        for old, new, target in zip(past, (k, v), present, strict=True):
            g.op("TensorScatter", [old, self.operators.to_narrow(new), "write_indices"], output=target, axis=-2)
        attended = self._fused(q, *present) if self.operators.narrow else self._float(q, *present)
        joined = g.op("Transpose", [attended], perm=[0, 2, 1, 3])
        return g.op("Reshape", [joined, g.ints(0, 0, body.heads * body.head_dim)])

    def _fused(self, q: str, keys: str, values: str) -> str:
        y = self.graph.op("Attention", [self.operators.to_narrow(q), keys, values, self._mask])
        return self.operators.to_float(y)

    def _float(self, q: str, keys: str, values: str) -> str:
        """Products and softmax; queries that share a key head stand side by side: [B, kv_heads, per, S, head_dim]."""
        g, body = self.graph, self.body
        per = body.heads // body.kv_heads
        scaled = g.op("Mul", [q, g.floats("attention.scale", 1 / math.sqrt(body.head_dim))])
        grouped = g.op("Reshape", [scaled, g.ints(0, body.kv_heads, per, -1, body.head_dim)])
        k, v = (g.op("Unsqueeze", [x, g.ints(2)]) for x in (keys, values))
        scores = g.op("MatMul", [grouped, g.op("Transpose", [k], perm=[0, 1, 2, 4, 3])])
        shares = g.op("Softmax", [g.op("Add", [scores, self._mask])], axis=-1)
        return g.op("Reshape", [g.op("MatMul", [shares, v]), g.ints(0, body.heads, -1, body.head_dim)])

    def _shape(self) -> list[Dim]:
        return ["B", self.body.kv_heads, self.frames, self.body.head_dim]

    def _cache_type(self) -> int:
        return self.operators.compute

    def _past(self, layer: int) -> list[str]:
        names = [f"past_{part}.{layer}" for part in ("key", "value")]
        return [self.graph.input(name, self._cache_type(), self._shape()) for name in names]

    def _present(self, layer: int) -> list[str]:
        names = [f"present_{part}.{layer}" for part in ("key", "value")]
        for name in names:
            self.graph.output(name, self._cache_type(), self._shape())
        return names

    def _heads(self, x: str) -> str:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
        split = self.graph.op("Reshape", [x, self.graph.ints(0, 0, -1, self.body.head_dim)])
        return self.graph.op("Transpose", [split], perm=[0, 2, 1, 3])

    def _normed(self, x: str, gain: F32, name: str) -> str:
        return self.graph.op("RMSNormalization", [x, self.graph.const(gain, name)], axis=-1, epsilon=self.body.norm_eps)
