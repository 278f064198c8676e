"""The attention layers of codecs, fed piece by piece: SNAC's local windows, Mimi's causal transformer."""

from __future__ import annotations

import math

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.codec_builder import END, CodecBuilder, Signal
from edgeomni.exporters.onnx.graph import FLOAT, INT64
from edgeomni.model import codec_plan as ops

Rotary = tuple[str, str]
"""Cosines and sines of each position's angles, [T, head]."""


def local(builder: CodecBuilder, op: ops.LocalAttention, x: Signal) -> Signal:
    """Whole windows of what was kept and x; the rest is kept."""
    g, head = builder.graph, op.channels // op.heads
    state = builder.state(op.name, [1, op.channels, 0], 2)
    joined = g.op("Concat", [state, builder.natural(x)], axis=2)
    window = g.ints(op.window)
    whole = g.op("Mul", [g.op("Div", [g.op("Shape", [joined], start=2), window]), window])
    value = g.op("Slice", [joined, g.ints(0), whole, g.ints(2)])
    rest = g.op("Slice", [joined, whole, g.ints(END), g.ints(2)])
    builder.keep(op.name, rest, [1, op.channels, f"keep.{op.name}"])
    y = _norm(builder, f"{op.name}.norm", g.op("Transpose", [value], perm=[0, 2, 1]), op.norm, op.eps)
    qkv = g.op("Reshape", [_linear(builder, f"{op.name}.qkv", y, op.qkv), g.ints(-1, op.window, 3, op.heads, head)])
    split = g.split(g.op("Transpose", [qkv], perm=[2, 0, 3, 1, 4]), 3, axis=0)
    rotary = (builder.const(f"{op.name}.cos", op.cos), builder.const(f"{op.name}.sin", op.sin))
    q, k, v = (g.op("Squeeze", [part, g.ints(0)]) for part in split)
    y = _attend(builder, _rotated(builder, q, rotary, head), _rotated(builder, k, rotary, head), v, head, None)
    y = g.op("Reshape", [g.op("Transpose", [y], perm=[0, 2, 1, 3]), g.ints(1, -1, op.channels)])
    y = g.op("Transpose", [_linear(builder, f"{op.name}.out", y, op.out)], perm=[0, 2, 1])
    return Signal(g.op("Add", [value, y]), np.ones(op.channels, np.float32))


def transformer(builder: CodecBuilder, op: ops.Transformer, x: Signal) -> Signal:
    """Causal blocks over x; keys and values of the last window - 1 latents, and the position, are kept."""
    g = builder.graph
    y = g.op("Transpose", [builder.natural(x)], perm=[0, 2, 1])
    position = builder.state(op.name, [1], 0, INT64)
    length = g.op("Shape", [y], start=1, end=2)
    builder.keep(op.name, g.op("Add", [position, length]), [1], INT64)
    steps = _range(builder, length)
    angles = g.op(
        "Mul",
        [
            g.op("Unsqueeze", [g.op("Cast", [g.op("Add", [steps, position])], to=FLOAT), g.ints(1)]),
            builder.const(f"{op.name}.inv_freq", np.tile(op.inv_freq, 2)),
        ],
    )
    scale = builder.const(f"{op.name}.scale", op.rotary_scale)
    rotary = (g.op("Mul", [g.op("Cos", [angles]), scale]), g.op("Mul", [g.op("Sin", [angles]), scale]))
    for block in op.blocks:
        y = _block(builder, op, block, y, steps, rotary)
    return Signal(g.op("Transpose", [y], perm=[0, 2, 1]), np.ones(x.channels, np.float32))


def _block(builder: CodecBuilder, op: ops.Transformer, block: ops.Block, x: str, steps: str, rotary: Rotary) -> str:
    g, head = builder.graph, op.head_dim
    y = _norm(builder, f"{block.name}.norm1", x, block.norm1, op.eps)
    y = _linear(builder, f"{block.name}.qkv", y, block.qkv, block.qkv_bias)
    y = g.op("Transpose", [g.op("Reshape", [y, g.ints(1, -1, len(block.qkv) // head, head)])], perm=[0, 2, 1, 3])
    q, k, v = g.ops("Split", [y, g.ints(op.heads, op.kv_heads, op.kv_heads)], 3, axis=1)
    k = _cached(builder, op, f"{block.name}.key", _rotated(builder, k, rotary, head))
    v = _cached(builder, op, f"{block.name}.value", v)
    q = _rotated(builder, q, rotary, head)
    if op.heads != op.kv_heads:  # queries of one key head side by side: [1, kv_heads, heads / kv_heads * T, head]
        k, v = (_repeated(builder, op, part) for part in (k, v))
    y = _attend(builder, q, k, v, head, _mask(builder, op, steps, k))
    y = g.op("Reshape", [g.op("Transpose", [y], perm=[0, 2, 1, 3]), g.ints(1, -1, op.heads * head)])
    x = g.op("Add", [x, _linear(builder, f"{block.name}.out", y, block.out, block.out_bias)])
    y = _norm(builder, f"{block.name}.norm2", x, block.norm2, op.eps)
    y = g.op("Gelu", [_linear(builder, f"{block.name}.fc1", y, block.fc1)])
    return g.op("Add", [x, _linear(builder, f"{block.name}.fc2", y, block.fc2)])


def _cached(builder: CodecBuilder, op: ops.Transformer, name: str, fresh: str) -> str:
    state = builder.state(name, [1, op.kv_heads, 0, op.head_dim], 2)
    joined = builder.graph.op("Concat", [state, fresh], axis=2)
    kept = builder.slice(joined, 1 - op.window, END, 2)
    builder.keep(name, kept, [1, op.kv_heads, f"keep.{name}", op.head_dim])
    return joined


def _mask(builder: CodecBuilder, op: ops.Transformer, steps: str, keys: str) -> str:
    """[T, M + T]: 0 where a latent sees a key, -inf elsewhere. `steps` 0..T-1; the newest keys are the latents' own."""
    g = builder.graph
    total = g.op("Shape", [keys], start=2, end=3)
    ahead = g.op("Sub", [total, g.op("Shape", [steps])])
    queries = g.op("Unsqueeze", [g.op("Add", [steps, ahead]), g.ints(1)])
    distance = g.op("Sub", [queries, g.op("Unsqueeze", [_range(builder, total), g.ints(0)])])
    seen = g.op("And", [g.op("GreaterOrEqual", [distance, g.ints(0)]), g.op("Less", [distance, g.ints(op.window)])])
    return g.op("Where", [seen, builder.const("mask.seen", 0.0), builder.const("mask.unseen", -np.inf)])


def _repeated(builder: CodecBuilder, op: ops.Transformer, x: str) -> str:
    """[1, kv_heads, M, head] -> [1, heads, M, head]"""
    g, times = builder.graph, op.heads // op.kv_heads
    wide = g.op("Expand", [g.op("Unsqueeze", [x, g.ints(2)]), g.ints(1, 1, times, 1, 1)])
    return g.op("Reshape", [wide, g.ints(1, op.heads, -1, op.head_dim)])


def _attend(builder: CodecBuilder, q: str, k: str, v: str, head: int, mask: str | None) -> str:
    """[.., T, head] x [.., M, head] -> [.., T, head]"""
    g = builder.graph
    scaled = g.op("Mul", [q, builder.const(f"attention.scale{head}", 1 / math.sqrt(head))])
    scores = g.op("MatMul", [scaled, g.op("Transpose", [k], perm=[0, 1, 3, 2])])
    if mask is not None:
        scores = g.op("Add", [scores, mask])
    return g.op("MatMul", [g.op("Softmax", [scores], axis=-1), v])


def _rotated(builder: CodecBuilder, x: str, rotary: Rotary, head: int) -> str:
    """Rotary position embedding, halves paired: x [.., T, head]."""
    g, (cos, sin) = builder.graph, rotary
    low, high = builder.slice(x, 0, head // 2, 3), builder.slice(x, head // 2, head, 3)
    turned = g.op("Concat", [g.op("Neg", [high]), low], axis=3)
    return g.op("Add", [g.op("Mul", [x, cos]), g.op("Mul", [turned, sin])])


def _linear(builder: CodecBuilder, name: str, x: str, weight: F32, bias: F32 | None = None) -> str:
    y = builder.graph.op("MatMul", [x, builder.weight(f"{name}.weight", weight.T)])
    return y if bias is None else builder.graph.op("Add", [y, builder.const(f"{name}.bias", bias)])


def _norm(builder: CodecBuilder, name: str, x: str, weight_bias: tuple[F32, F32], eps: float) -> str:
    weight, bias = (builder.const(f"{name}.{kind}", v) for kind, v in zip(("weight", "bias"), weight_bias, strict=True))
    return builder.graph.op("LayerNormalization", [x, weight, bias], axis=-1, epsilon=eps)


def _range(builder: CodecBuilder, length: str) -> str:
    """0 .. length-1, int64; `length` int64 [1]."""
    g = builder.graph
    zero, one = (g.const(np.array(v, np.int64), f"scalar_{v}") for v in (0, 1))
    return g.op("Range", [zero, g.op("Squeeze", [length, g.ints(0)]), one])
