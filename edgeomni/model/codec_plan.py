"""A codec decoder as a small program of layers, each of which can be fed piece by piece.

Signals are [channels, length]. A layer that looks at neighbours keeps its last input samples between pushes, so
that joined pushes equal one pass over everything: at the start it holds its left padding (zeros), at the end it is
given its own right padding. Its outputs begin at index 0 and are final; it only lags by its right padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..arrays import F32
from ..spec import CodecSpec


@dataclass(frozen=True)
class Lookup:
    """Ids -> latents. Level i's rows, `tables[i]` [codebook, dim], are held for `strides[i]` latents each.

    Levels of one of the `groups` are summed; groups are stacked along the channels.
    """

    name: str
    tables: tuple[F32, ...]
    strides: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Conv:
    """Convolution with `weight` [out, in / groups, k], stride 1, zero padding `left` and `right`."""

    name: str
    weight: F32
    bias: F32 | None
    left: int = 0
    right: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.inputs == self.outputs > 1


@dataclass(frozen=True)
class Up:
    """Transposed convolution, read as a convolution over `m` inputs that puts out `stride` samples at once.

    `taps` [m, stride, out, in] ([m, stride, channels] where depthwise): tap m-1 meets the newest input. Of the
    blocks so made, the first `drop` samples ever and the last `crop` samples ever do not belong to the output;
    `right` zeros follow the input's end.
    """

    name: str
    taps: F32
    bias: F32 | None
    drop: int
    crop: int
    right: int

    @property
    def left(self) -> int:
        return len(self.taps) - 1

    @property
    def stride(self) -> int:
        return int(self.taps.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.taps.shape[-1])

    @property
    def outputs(self) -> int:
        return int(self.taps.shape[2])

    @property
    def depthwise(self) -> bool:
        return self.taps.ndim == 3

    @cached_property
    def matrix(self) -> F32:
        """All taps as one matrix [m * in, stride * out], for a product with m inputs side by side; not depthwise."""
        return np.ascontiguousarray(self.taps.transpose(0, 3, 1, 2).reshape(len(self.taps) * self.inputs, -1))


@dataclass(frozen=True)
class Snake:
    """x + sin(alpha x)^2 / alpha (arXiv 2006.08195), `alpha` [channels]."""

    name: str
    alpha: F32


@dataclass(frozen=True)
class Elu:
    name: str


@dataclass(frozen=True)
class Tanh:
    name: str


@dataclass(frozen=True)
class Noise:
    """x + noise * (weight x), one noise value per sample for all channels; `weight` [channels, channels]."""

    name: str
    weight: F32
    index: int


@dataclass(frozen=True)
class Residual:
    """body(x) + x, or body(x) + shortcut(x), x delayed as much as the body lags."""

    name: str
    body: tuple[Op, ...]
    channels: int
    shortcut: Conv | None = None

    @property
    def delay(self) -> int:
        return sum(op.right for op in self.body if isinstance(op, Conv))


@dataclass(frozen=True)
class LocalAttention:
    """SNAC's LocalMHA: x + attention(norm(x)) within windows of `window` latents; `cos`, `sin` [window, head]."""

    name: str
    window: int
    heads: int
    norm: tuple[F32, F32]
    eps: float
    qkv: F32
    out: F32
    cos: F32
    sin: F32

    @property
    def channels(self) -> int:
        return len(self.out)


@dataclass(frozen=True)
class Block:
    """One pre-norm transformer block, its layer scales folded into `out` and `fc2`; linear weights [out, in]."""

    name: str
    norm1: tuple[F32, F32]
    qkv: F32
    qkv_bias: F32 | None
    out: F32
    out_bias: F32 | None
    norm2: tuple[F32, F32]
    fc1: F32
    fc2: F32


@dataclass(frozen=True)
class Transformer:
    """Causal transformer with rotary positions; a latent sees itself and `window` - 1 before it."""

    name: str
    blocks: tuple[Block, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    eps: float
    inv_freq: F32
    rotary_scale: float = 1.0


Op = Lookup | Conv | Up | Snake | Elu | Tanh | Noise | Residual | LocalAttention | Transformer


@dataclass(frozen=True)
class Pace:
    """After N latents a place in the program has seen N * scale - lag samples; nothing is held back at the end."""

    scale: int = 1
    lag: int = 0


@dataclass(frozen=True)
class CodecPlan:
    """The whole decoder of `spec`, from ids to samples."""

    spec: CodecSpec
    ops: tuple[Op, ...]

    def paces(self) -> Iterator[tuple[Op, Pace]]:
        """Each layer, inner ones included, with the pace of its output."""
        return _walk(self.ops, Pace())

    @property
    def noise_paces(self) -> tuple[Pace, ...]:
        """Pace of each noise input, in the order of the signal."""
        return tuple(pace for op, pace in self.paces() if isinstance(op, Noise))

    @property
    def lag_samples(self) -> int:
        """Samples of the latest codec frames that a push cannot give yet."""
        return list(self.paces())[-1][1].lag

    @property
    def push_multiple(self) -> int:
        """Codec frames in a push: 1, or whole attention windows."""
        windows = [op.window for op in self.ops if isinstance(op, LocalAttention)]
        coarsest = self.spec.vq_strides[0]
        return math.lcm(coarsest, *windows) // coarsest

    @property
    def first_push(self) -> int:
        """Codec frames until every layer has put something out: what the first push must hold."""
        latents = max(pace.lag // pace.scale + 1 for _, pace in self.paces())
        per_push = self.push_multiple * self.spec.vq_strides[0]
        return -(-latents // per_push) * self.push_multiple


def _walk(ops: Sequence[Op], pace: Pace) -> Iterator[tuple[Op, Pace]]:
    for op in ops:
        if isinstance(op, Residual):
            yield from _walk(op.body, pace)
            pace = Pace(pace.scale, pace.lag + op.delay)
        elif isinstance(op, Conv):
            pace = Pace(pace.scale, pace.lag + op.right)
        elif isinstance(op, Up):
            pace = Pace(pace.scale * op.stride, pace.lag * op.stride + op.drop)
        elif isinstance(op, LocalAttention):
            pace = Pace(pace.scale, -(-pace.lag // op.window) * op.window)
        yield op, pace
