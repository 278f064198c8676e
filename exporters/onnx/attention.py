"""Rotary attention with a KV cache of fixed size, two ways: ONNX Runtime's fused operator, and standard operators.

Both read the packed projection [B, S, (heads + 2 * kv_heads) * head_dim] (query, key, value) and write new keys and
values into the cache [B, kv_heads, M, head_dim] behind the frames that it already holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import FLOAT, INT32, INT64, MS, Dim, Graph
from edgeomni.exporters.onnx.options import Flavour
from edgeomni.spec import BodySpec

GQA_HEAD_MULTIPLE = 16
"""GroupQueryAttention on CPU takes head sizes that are a multiple of this."""


@dataclass(frozen=True)
class Rope:
    """Rotary caches [context, head_dim / 2]: angle = position * inverse frequency, scaled (arXiv 2104.09864)."""

    cos: F32
    sin: F32

    @classmethod
    def of(cls, inverse_frequencies: F32, scaling: float, context: int) -> Rope:
        angles = np.outer(np.arange(context, dtype=np.float32), inverse_frequencies).astype(np.float64)
        return cls((np.cos(angles) * scaling).astype(np.float32), (np.sin(angles) * scaling).astype(np.float32))


class CachedAttention(ABC):
    """Cache inputs and outputs, which both kinds have."""

    name: ClassVar[str]
    """What a component's meta calls this kind; it says which inputs the graph has."""
    opset: ClassVar[int]

    def __init__(self, graph: Graph, body: BodySpec, rope: Rope) -> None:
        self.graph, self.body = graph, body
        self.cos, self.sin = graph.const(rope.cos, "rope.cos"), graph.const(rope.sin, "rope.sin")

    @abstractmethod
    def declare(self) -> None:
        """Adds the graph's inputs that are not of one layer."""

    @abstractmethod
    def __call__(self, qkv: str, layer: int, head_norms: tuple[F32, F32] | None, prefix: str) -> str:
        """Attention of one layer: packed projection in, [B, S, heads * head_dim] out.

        `head_norms` are the gains [head_dim] of query's and key's norms, whose constants are named by `prefix`.
        """

    def _split(self, qkv: str) -> list[str]:
        sizes = [n * self.body.head_dim for n in (self.body.heads, self.body.kv_heads, self.body.kv_heads)]
        return self.graph.ops("Split", [qkv, self.graph.ints(*sizes)], 3, axis=-1)

    def _shape(self) -> list[Dim]:
        return ["B", self.body.kv_heads, "M", self.body.head_dim]

    def _past(self, layer: int) -> list[str]:
        return [self.graph.input(f"past_{part}.{layer}", FLOAT, self._shape()) for part in ("key", "value")]

    def _present(self, layer: int) -> list[str]:
        names = [f"present_{part}.{layer}" for part in ("key", "value")]
        for name in names:
            self.graph.output(name, FLOAT, self._shape())
        return names


class GroupQuery(CachedAttention):
    """com.microsoft GroupQueryAttention: rotation, cache and attention in one operator.

    Its own head norms (q_norm_weight, k_norm_weight) exist on GPUs only, so they are operators before it.
    More inputs: seqlens_k int32 [B] (frames after this call, less one), total_sequence_length int32 [].
    """

    name = "gqa"
    opset = 21

    def declare(self) -> None:
        self.graph.input("seqlens_k", INT32, ["B"])
        self.graph.input("total_sequence_length", INT32, [])

    def __call__(self, qkv: str, layer: int, head_norms: tuple[F32, F32] | None, prefix: str) -> str:
        q, k, v = self._split_normed(qkv, head_norms, prefix) if head_norms else (qkv, "", "")
        inputs = [q, k, v, *self._past(layer), "seqlens_k", "total_sequence_length", self.cos, self.sin]
        outputs = [self.graph.unique("attention"), *self._present(layer)]
        heads = {"num_heads": self.body.heads, "kv_num_heads": self.body.kv_heads}
        self.graph.ops("GroupQueryAttention", inputs, outputs, domain=MS, **heads, do_rotary=1, rotary_interleaved=0)
        return outputs[0]

    def _split_normed(self, qkv: str, norms: tuple[F32, F32], prefix: str) -> tuple[str, str, str]:
        q, k, v = self._split(qkv)
        return self._normed(q, norms[0], f"{prefix}.q_norm"), self._normed(k, norms[1], f"{prefix}.k_norm"), v

    def _normed(self, x: str, gain: F32, name: str) -> str:
        """RMSNorm of each head of [B, S, heads * head_dim]."""
        g = self.graph
        heads = g.op("Reshape", [x, g.ints(0, 0, -1, self.body.head_dim)])
        inputs = [heads, g.const(gain, name)]
        normed = g.op("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=self.body.norm_eps, stash_type=1)
        return g.op("Reshape", [normed, g.ints(0, 0, -1)])


class Scatter(CachedAttention):
    """Standard operators of opset 24: RotaryEmbedding, TensorScatter, Attention with nonpad_kv_seqlen.

    More inputs: position_ids int64 [B, S], write_indices int64 [B] (frames cached so far), nonpad_kv_seqlen
    int64 [B] (frames after this call).
    """

    name = "scatter"
    opset = 24

    def declare(self) -> None:
        self.graph.input("position_ids", INT64, ["B", "S"])
        self.graph.input("write_indices", INT64, ["B"])
        self.graph.input("nonpad_kv_seqlen", INT64, ["B"])

    def __call__(self, qkv: str, layer: int, head_norms: tuple[F32, F32] | None, prefix: str) -> str:
        g, body = self.graph, self.body
        q, k, v = (self._heads(part) for part in self._split(qkv))
        if head_norms:
            q, k = (self._normed(x, w, f"{prefix}.{n}_norm") for x, w, n in zip((q, k), head_norms, "qk", strict=True))
        q, k = (g.op("RotaryEmbedding", [x, self.cos, self.sin, "position_ids"]) for x in (q, k))
        past, present = self._past(layer), self._present(layer)
        for old, new, target in zip(past, (k, v), present, strict=True):
            g.op("TensorScatter", [old, new, "write_indices"], output=target, axis=2)
        a = g.op("Attention", [q, *present, "", "", "", "nonpad_kv_seqlen"], is_causal=1)
        joined = g.op("Transpose", [a], perm=[0, 2, 1, 3])
        return g.op("Reshape", [joined, g.ints(0, 0, body.heads * body.head_dim)])

    def _heads(self, x: str) -> str:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
        split = self.graph.op("Reshape", [x, self.graph.ints(0, 0, -1, self.body.head_dim)])
        return self.graph.op("Transpose", [split], perm=[0, 2, 1, 3])

    def _normed(self, x: str, gain: F32, name: str) -> str:
        inputs = [x, self.graph.const(gain, name)]
        return self.graph.op("RMSNormalization", inputs, axis=-1, epsilon=self.body.norm_eps)


def attention_for(flavour: Flavour, head_dim: int) -> type[CachedAttention]:
    """The kind of attention that a flavour has for heads of that size."""
    return GroupQuery if flavour == "ort" and head_dim % GQA_HEAD_MULTIPLE == 0 else Scatter
