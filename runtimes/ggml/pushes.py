"""What a codec's graph is told by: the kind of push it is for, and the signals between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeomni.arrays import F32
from edgeomni.codec_layers import CodecLayer


@dataclass(frozen=True)
class Push:
    """What kind of push a graph is for: latents given, at the stream's start or end, with noise, rows kept by layer."""

    latents: int
    first: bool
    last: bool
    noisy: bool
    kept: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Signal:
    """A tensor [samples, channels], None for no samples; `bias` [channels] is still to be added to it."""

    value: int | None
    channels: int
    bias: F32 | None = None


def edges(layer: CodecLayer) -> tuple[int, int, int]:
    """Rows of zeros before a convolution's input, rows that it keeps, rows of zeros behind its input."""
    keep = layer.left if layer.op == "up" else (layer.taps - 1) * layer.dilation
    return layer.left, keep, layer.right


def nodes_for(layers: Sequence[CodecLayer]) -> int:
    """More tensors than these layers can need."""
    total = 64
    for layer in layers:
        total += 32 + 8 * layer.taps + 96 * layer.blocks + nodes_for(layer.body) * bool(layer.body)
        total += nodes_for([layer.shortcut]) if layer.shortcut is not None else 0
    return total
