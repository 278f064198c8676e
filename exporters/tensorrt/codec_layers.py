"""A codec's layers on a static streaming graph (codec_builder.py): what codec_plan describes, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import FLOAT, INT64
from edgeomni.exporters.tensorrt.codec_builder import END, StaticBuilder
from edgeomni.model import codec_plan as ops
from edgeomni.model.codec_plan import CodecPlan, Pace

_UNSEEN = -1e9
"""Added to the score of a key that is not seen. Finite, so that a position that sees none stays a number."""


class StaticLayers:
    """Adds the layers of `plan` to the builder's graph. Signals are [1, channels, n] in float32."""

    def __init__(self, builder: StaticBuilder, plan: CodecPlan) -> None:
        self.builder, self.graph, self.operators, self.plan = builder, builder.graph, builder.operators, plan
        self._pace = {id(op): pace for op, pace in plan.paces()}
        self._emit: dict[type, Callable[[Any, str], str]] = {
            ops.Conv: self._conv,
            ops.Up: self._up,
            ops.Residual: self._residual,
            ops.Noise: self._noise,
            ops.Snake: self._snake,
            ops.Elu: lambda _, x: self.graph.op("Elu", [x]),
            ops.Tanh: lambda _, x: self.graph.op("Tanh", [x]),
            ops.LocalAttention: self._local,
            ops.Transformer: self._transformer,
        }

    def run(self) -> str:
        """From the inputs codes.<level> to the wave [1, 1, n]."""
        return self._run(self.plan.ops[1:], self._lookup(self.plan.ops[0]))  # type: ignore[arg-type]

    def _run(self, layers: Sequence[ops.Op], x: str) -> str:
        for op in layers:
            x = self._emit[type(op)](op, x)
        return x

    def _lookup(self, op: ops.Lookup) -> str:
        g, groups = self.graph, dict[int, str]()
        for level, (table, stride, group) in enumerate(zip(op.tables, op.strides, op.groups, strict=True)):
            ids = g.input(f"codes.{level}", INT64, [f"ids{level}"])
            if stride > 1:
                held = g.op("Expand", [g.op("Unsqueeze", [ids, g.ints(1)]), g.ints(1, stride)])
                ids = g.op("Reshape", [held, g.ints(-1)])
            rows = self.operators.to_float(g.op("Gather", [self.builder.weight(f"{op.name}.{level}", table), ids]))
            groups[group] = g.op("Add", [groups[group], rows]) if group in groups else rows
        rows = g.op("Concat", list(groups.values()), axis=1) if len(groups) > 1 else groups[0]
        return self.builder.valid(g.op("Unsqueeze", [g.op("Transpose", [rows], perm=[1, 0]), g.ints(0)]), Pace())

    def _conv(self, op: ops.Conv, x: str) -> str:
        keep = (op.weight.shape[2] - 1) * op.dilation
        y = self._convolved(op, self.builder.joined(op.name, x, op.inputs, keep))
        return self.builder.valid(y, self._pace[id(op)])

    def _convolved(self, op: ops.Conv, x: str) -> str:
        inputs = [self.builder.weight(f"{op.name}.weight", op.weight)]
        if op.bias is not None:
            inputs.append(self.builder.const(f"{op.name}.bias", op.bias))
        return self.operators.conv(x, inputs, op.groups, op.dilation)

    def _up(self, op: ops.Up, x: str) -> str:
        """Each window of m inputs makes `stride` samples: a product of overlapping rows, in place of ConvTranspose."""
        g, m = self.graph, len(op.taps)
        z = self.builder.joined(op.name, x, op.inputs, op.left)
        windows = [self.builder.slice(z, j, j - m + 1 or END, 2) for j in range(m)] if m > 1 else [z]
        y = g.op(
            "Reshape",
            [self._depthwise(op, windows) if op.depthwise else self._rows(op, windows), g.ints(1, -1, op.outputs)],
        )
        if op.bias is not None:
            y = g.op("Add", [y, self.builder.const(f"{op.name}.bias", op.bias)])
        return self.builder.valid(g.op("Transpose", [y], perm=[0, 2, 1]), self._pace[id(op)])

    def _rows(self, op: ops.Up, windows: Sequence[str]) -> str:
        """[1, n, stride * outputs]"""
        g = self.graph
        stacked = g.op("Concat", list(windows), axis=1) if len(windows) > 1 else windows[0]
        return self.builder.product(g.op("Transpose", [stacked], perm=[0, 2, 1]), op.name, op.matrix.T)

    def _depthwise(self, op: ops.Up, windows: Sequence[str]) -> str:
        """[1, n, stride, channels]"""
        g, y = self.graph, ""
        for j, window in enumerate(windows):
            rows = g.op("Unsqueeze", [g.op("Transpose", [window], perm=[0, 2, 1]), g.ints(2)])
            taps = self.operators.to_float(self.builder.weight(f"{op.name}.taps.{j}", op.taps[j]))
            part = g.op("Mul", [rows, taps])
            y = g.op("Add", [y, part]) if y else part
        return y

    def _snake(self, op: ops.Snake, x: str) -> str:
        """x + sin(alpha x)^2 / alpha, in float32: half's steps would be heard in the sine's argument."""
        g, alpha = self.graph, op.alpha[:, None]
        root = g.op("Sin", [g.op("Mul", [x, self.builder.const(f"{op.name}.alpha", alpha)])])
        inverse = self.builder.const(f"{op.name}.inverse", 1 / (alpha + np.float32(1e-9)))
        return g.op("Add", [x, g.op("Mul", [g.op("Mul", [root, root]), inverse])])

    def _noise(self, op: ops.Noise, x: str) -> str:
        g = self.graph
        noise = g.input(f"noise.{op.index}", FLOAT, [1, 1, f"noise{op.index}"])
        weight = self.builder.weight(f"{op.name}.weight", op.weight)
        mixed = self.operators.to_float(g.op("MatMul", [weight, self.operators.to_narrow(x)]))
        return g.op("Add", [x, g.op("Mul", [noise, mixed])])

    def _residual(self, op: ops.Residual, x: str) -> str:
        skip = x
        if op.delay:
            skip = self.builder.slice(self.builder.joined(op.name, x, op.channels, op.delay), 0, -op.delay, 2)
        if op.shortcut is not None:
            skip = self.builder.valid(self._convolved(op.shortcut, skip), self._pace[id(op)])
        return self.graph.op("Add", [self._run(op.body, x), skip])

    def _local(self, op: ops.LocalAttention, x: str) -> str:
        """Whole windows, which begin at multiples of their length: what is too new for one waits in the state."""
        g, b, head = self.graph, self.builder, op.channels // op.heads
        pace = self._pace[id(op)]
        waiting = pace.lag - self._lag_before(op)
        value = b.joined(op.name, x, op.channels, waiting)
        if waiting:
            value = b.slice(value, 0, -waiting, 2)
        y = self._norm(f"{op.name}.norm", g.op("Transpose", [value], perm=[0, 2, 1]), op.norm, op.eps)
        split = g.op("Reshape", [b.product(y, f"{op.name}.qkv", op.qkv), g.ints(-1, op.window, 3, op.heads, head)])
        parts = g.split(g.op("Transpose", [split], perm=[2, 0, 3, 1, 4]), 3, axis=0)
        q, k, v = (g.op("Squeeze", [part, g.ints(0)]) for part in parts)
        rotary = (b.const(f"{op.name}.cos", op.cos), b.const(f"{op.name}.sin", op.sin))
        y = self._attend(self._rotated(q, rotary, head), self._rotated(k, rotary, head), v, head, None)
        y = g.op("Reshape", [g.op("Transpose", [y], perm=[0, 2, 1, 3]), g.ints(1, -1, op.channels)])
        y = g.op("Transpose", [b.product(y, f"{op.name}.out", op.out)], perm=[0, 2, 1])
        return b.valid(g.op("Add", [value, y]), pace)

    def _lag_before(self, op: ops.Op) -> int:
        """The lag of what goes into `op`, a layer of the outermost row."""
        before = self.plan.ops[self.plan.ops.index(op) - 1]
        return self._pace[id(before)].lag

    def _transformer(self, op: ops.Transformer, x: str) -> str:
        """Causal blocks; the keys and values of the last window - 1 latents are kept, and masked before the start."""
        g, b, pace = self.graph, self.builder, self._pace[id(op)]
        y = g.op("Transpose", [x], perm=[0, 2, 1])
        at = b.positions(y, pace, axis=1)
        angles = g.op(
            "Mul",
            [
                g.op("Unsqueeze", [g.op("Cast", [at], to=FLOAT), g.ints(1)]),
                b.const(f"{op.name}.inv_freq", np.tile(op.inv_freq, 2)),
            ],
        )
        scale = b.const(f"{op.name}.scale", op.rotary_scale)
        rotary = (g.op("Mul", [g.op("Cos", [angles]), scale]), g.op("Mul", [g.op("Sin", [angles]), scale]))
        mask = self._mask(op, y, at)
        for block in op.blocks:
            y = self._block(op, block, y, rotary, mask)
        return b.valid(g.op("Transpose", [y], perm=[0, 2, 1]), pace)

    def _mask(self, op: ops.Transformer, y: str, at: str) -> str:
        """[n, window - 1 + n]: 0 where a latent sees a key, _UNSEEN elsewhere; keys begin window - 1 before `at`."""
        g, b, kept = self.graph, self.builder, op.window - 1
        first = b.slice(at, 0, 1, 0)
        earlier = g.const(np.arange(-kept, 0, dtype=np.int64), f"{op.name}.earlier")
        keys = g.op("Concat", [g.op("Add", [first, earlier]), at], axis=0) if kept else at
        distance = g.op("Sub", [g.op("Unsqueeze", [at, g.ints(1)]), g.op("Unsqueeze", [keys, g.ints(0)])])
        near = g.op("And", [g.op("GreaterOrEqual", [distance, g.ints(0)]), g.op("Less", [distance, g.ints(op.window)])])
        seen = g.op("And", [near, g.op("GreaterOrEqual", [g.op("Unsqueeze", [keys, g.ints(0)]), g.ints(0)])])
        return g.op("Where", [seen, b.const("zero", 0.0), b.const("unseen", _UNSEEN)])

    def _block(self, op: ops.Transformer, block: ops.Block, x: str, rotary: tuple[str, str], mask: str) -> str:
        g, b, head = self.graph, self.builder, op.head_dim
        y = self._norm(f"{block.name}.norm1", x, block.norm1, op.eps)
        y = b.product(y, f"{block.name}.qkv", block.qkv, block.qkv_bias)
        y = g.op("Transpose", [g.op("Reshape", [y, g.ints(1, -1, len(block.qkv) // head, head)])], perm=[0, 2, 1, 3])
        q, k, v = g.ops("Split", [y, g.ints(op.heads, op.kv_heads, op.kv_heads)], 3, axis=1)
        shape = [1, op.kv_heads, op.window - 1, head]
        k = b.kept_before(f"{block.name}.key", self._rotated(k, rotary, head), shape, 2)
        v = b.kept_before(f"{block.name}.value", v, shape, 2)
        q = self._rotated(q, rotary, head)
        if op.heads != op.kv_heads:
            k, v = (self._repeated(op, part) for part in (k, v))
        y = self._attend(q, k, v, head, mask)
        y = g.op("Reshape", [g.op("Transpose", [y], perm=[0, 2, 1, 3]), g.ints(1, -1, op.heads * head)])
        x = g.op("Add", [x, b.product(y, f"{block.name}.out", block.out, block.out_bias)])
        y = self._norm(f"{block.name}.norm2", x, block.norm2, op.eps)
        y = g.op("Gelu", [b.product(y, f"{block.name}.fc1", block.fc1)])
        return g.op("Add", [x, b.product(y, f"{block.name}.fc2", block.fc2)])

    def _repeated(self, op: ops.Transformer, x: str) -> str:
        """[1, kv_heads, M, head] -> [1, heads, M, head]"""
        g = self.graph
        wide = g.op("Expand", [g.op("Unsqueeze", [x, g.ints(2)]), g.ints(1, 1, op.heads // op.kv_heads, 1, 1)])
        return g.op("Reshape", [wide, g.ints(1, op.heads, -1, op.head_dim)])

    def _attend(self, q: str, k: str, v: str, head: int, mask: str | None) -> str:
        g = self.graph
        scaled = g.op("Mul", [q, self.builder.const(f"attention.scale{head}", 1 / math.sqrt(head))])
        scores = g.op("MatMul", [scaled, g.op("Transpose", [k], perm=[0, 1, 3, 2])])
        if mask is not None:
            scores = g.op("Add", [scores, mask])
        return g.op("MatMul", [g.op("Softmax", [scores], axis=-1), v])

    def _rotated(self, x: str, rotary: tuple[str, str], head: int) -> str:
        """Rotary position embedding, halves paired: x [.., T, head]."""
        g, b, (cos, sin) = self.graph, self.builder, rotary
        low, high = b.slice(x, 0, head // 2, 3), b.slice(x, head // 2, head, 3)
        turned = g.op("Concat", [g.op("Neg", [high]), low], axis=3)
        return g.op("Add", [g.op("Mul", [x, cos]), g.op("Mul", [turned, sin])])

    def _norm(self, name: str, x: str, weight_bias: tuple[F32, F32], eps: float) -> str:
        named = zip(("weight", "bias"), weight_bias, strict=True)
        inputs = [x, *(self.builder.const(f"{name}.{kind}", value) for kind, value in named)]
        return self.graph.op("LayerNormalization", inputs, axis=-1, epsilon=eps)
