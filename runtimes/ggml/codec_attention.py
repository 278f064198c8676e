"""The attention layers of codecs, fed piece by piece: SNAC's local windows, Mimi's causal transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.codec_layers import CodecLayer
from edgeomni.runtimes.ggml.library import F32 as FLOAT
from edgeomni.runtimes.ggml.pushes import Signal

if TYPE_CHECKING:
    from edgeomni.runtimes.ggml.decoding import Decoding

Arrays = dict[str, NDArray[Any]]


def local(d: Decoding, layer: CodecLayer, x: Signal) -> Signal:
    """Whole windows of what was kept and x; the rest is kept. Windows do not see one another."""
    g, w, h, n = d.graph, layer.window, layer.heads, layer.head_dim
    before = None if d.push.first else d.state(layer.name)
    parts = [part for part in (before, x.value) if part is not None]
    if not parts:
        return x
    z = parts[0] if len(parts) == 1 else g.joined(*parts)
    rows = g.shape(z)[0]
    whole = rows // w * w
    if whole < rows and not d.push.last:
        d.keep(layer.name, g.cut(z, whole, rows))
    if not whole:
        return Signal(None, x.channels)
    z = g.contiguous(g.cut(z, 0, whole))
    y = g.norm(z, d.weights[f"{layer.name}.norm.gain"], d.weights[f"{layer.name}.norm.bias"], layer.eps)
    y = g.linear(d.weights[f"{layer.name}.qkv.weight"], y)
    q, k, v = (g.columns(y, i * h * n, (i + 1) * h * n) for i in range(3))
    split = [g.reshaped(g.contiguous(part), whole // w, w, h, n) for part in (q, k, v)]
    q, k, v = (g.contiguous(g.permuted(part, 0, 2, 1, 3)) for part in split)  # [windows, heads, window, n]
    cos, sin = d.weights[f"{layer.name}.cos"], d.weights[f"{layer.name}.sin"]
    y = _attend(d, rotated(d, q, cos, sin), rotated(d, k, cos, sin), v, None)
    y = g.reshaped(g.contiguous(g.permuted(y, 0, 2, 1, 3)), whole, h * n)
    return Signal(g.add(z, g.linear(d.weights[f"{layer.name}.out.weight"], y)), x.channels)


def transformer(d: Decoding, layer: CodecLayer, x: Signal) -> Signal:
    """Causal blocks over x [t, d]. The last window - 1 keys and values are kept, as many from the start on: a mask
    hides those that were never given.
    """
    assert x.value is not None
    g, t, past = d.graph, d.graph.shape(x.value)[0], layer.window - 1
    d.given[f"{layer.name}.cos"] = cos = g.input(FLOAT, t, layer.head_dim)
    d.given[f"{layer.name}.sin"] = sin = g.input(FLOAT, t, layer.head_dim)
    d.given[f"{layer.name}.mask"] = mask = g.input(FLOAT, t, past + t)
    y = x.value
    for i in range(layer.blocks):
        y = _block(d, layer, f"{layer.name}.{i}", y, (cos, sin, mask))
    return Signal(y, x.channels)


def positions(d: Decoding, kept: Arrays) -> tuple[Arrays, Arrays]:
    """What the transformers' graphs are given for this push, and the positions to keep behind it.

    Rotary angles of the positions, tiled for pairs half a head apart; 0 in the mask where a latent sees a key.
    """
    given, now = Arrays(), Arrays()
    for name in [key.removesuffix(".mask") for key in d.given if key.endswith(".mask")]:
        layer = next(layer for layer in d.layers if layer.name == name)
        t, past, at = d.graph.shape(d.given[f"{name}.cos"])[0], layer.window - 1, int(kept.get(name, np.zeros(1))[0])
        angles = (at + np.arange(t, dtype=np.float32))[:, None] * np.tile(d.vectors[f"{name}.inv_freq"], 2)
        given[f"{name}.cos"] = np.cos(angles) * np.float32(layer.rotary_scale)
        given[f"{name}.sin"] = np.sin(angles) * np.float32(layer.rotary_scale)
        keys = at - past + np.arange(past + t)
        distance = at + np.arange(t)[:, None] - keys
        seen = (distance >= 0) & (distance < layer.window) & (keys >= 0)
        given[f"{name}.mask"] = np.where(seen, np.float32(0), np.float32(-np.inf))
        now[name] = np.array([at + t], np.int64)
    return given, now


def rotated(d: Decoding, x: int, cos: int, sin: int) -> int:
    """Rotary position embedding, halves paired: x [.., T, head], cos and sin [T, head]."""
    g, half = d.graph, d.graph.shape(x)[-1] // 2
    low, high = g.columns(x, 0, half), g.columns(x, half, 2 * half)
    turned = g.joined(g.scaled(g.contiguous(high), -1.0), g.contiguous(low), axis=1)
    return g.add(g.mul(x, cos), g.mul(turned, sin))


def _block(d: Decoding, layer: CodecLayer, name: str, x: int, given: tuple[int, int, int]) -> int:
    g, n, (cos, sin, mask) = d.graph, layer.head_dim, given
    t = g.shape(x)[0]
    y = _linear(d, f"{name}.qkv", _norm(d, layer, f"{name}.norm1", x))
    sizes = [layer.heads * n, layer.kv_heads * n, layer.kv_heads * n]
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    parts = [g.contiguous(g.columns(y, a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    q, k, v = (g.contiguous(g.permuted(g.reshaped(p, 1, t, -(-g.shape(p)[1] // n), n), 0, 2, 1, 3)) for p in parts)
    k = _cached(d, layer, f"{name}.key", rotated(d, k, cos, sin))
    v = _cached(d, layer, f"{name}.value", v)
    y = _attend(d, rotated(d, q, cos, sin), k, v, mask)
    y = g.reshaped(g.contiguous(g.permuted(y, 0, 2, 1, 3)), t, layer.heads * n)
    x = g.add(x, _linear(d, f"{name}.out", y))
    hidden = g.unary("gelu_erf", _linear(d, f"{name}.fc1", _norm(d, layer, f"{name}.norm2", x)))
    return g.add(x, _linear(d, f"{name}.fc2", hidden))


def _cached(d: Decoding, layer: CodecLayer, name: str, fresh: int) -> int:
    """fresh [kv_heads, t, n] behind the window - 1 rows kept; keeps as many."""
    g, past = d.graph, layer.window - 1
    if not past:
        return fresh
    kv, n = layer.kv_heads, layer.head_dim
    before = d.zeros(kv * past, n) if d.push.first else d.state(name)
    assert before is not None
    joined = g.joined(g.reshaped(before, 1, kv, past, n), fresh, axis=0)
    if not d.push.last:
        t = g.shape(fresh)[-2]
        d.keep(name, g.reshaped(g.contiguous(g.rows_of(joined, t, t + past)), kv * past, n))
    return joined


def _attend(d: Decoding, q: int, k: int, v: int, mask: int | None) -> int:
    """q [.., heads, t, n], k and v [.., kv_heads, m, n] -> [.., heads, t, n]"""
    g, n = d.graph, d.graph.shape(q)[-1]
    weights = g.softmax(g.linear(k, q), mask, n**-0.5)
    return g.linear(g.contiguous(g.permuted(v, 0, 1, 3, 2)), weights)


def _linear(d: Decoding, name: str, x: int) -> int:
    bias = f"{name}.bias"
    return d.graph.linear(d.weights[f"{name}.weight"], x, d.weights.get(bias))


def _norm(d: Decoding, layer: CodecLayer, name: str, x: int) -> int:
    return d.graph.norm(x, d.weights[f"{name}.gain"], d.weights[f"{name}.bias"], layer.eps)
