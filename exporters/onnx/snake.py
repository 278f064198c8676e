"""SNAC's snake activation, x + sin(alpha x)^2 / alpha (arXiv 2006.08195), with its factors folded into its neighbours.

The operators compute the activation but for constant factors: a factor period / alpha before, which the layer in
front is asked to put out with, and a factor gain / alpha behind, which becomes the gain of the signal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.codec_builder import CodecBuilder, Signal
from edgeomni.model import codec_plan as ops

_SMALLEST_ALPHA = 1e-9
"""A snake with a smaller alpha is the identity to float32's precision; dividing by it would not be."""


def wanted_gain(builder: CodecBuilder, following: Sequence[ops.Op]) -> F32 | None:
    """The gain that the layers to follow would like their input to have; None where it makes no difference to them."""
    first = following[0]
    if isinstance(first, ops.Noise):
        return wanted_gain(builder, following[1:])
    if isinstance(first, ops.Residual):
        return wanted_gain(builder, first.body)
    return builder.operators.snake_period / _alpha(first) if isinstance(first, ops.Snake) else None


def emit(builder: CodecBuilder, op: ops.Snake, x: Signal) -> Signal:
    operators, alpha = builder.operators, _alpha(op)
    wanted, u = operators.snake_period / alpha, x.value
    if not np.array_equal(x.gain, wanted):
        rescale = builder.const(f"{op.name}.rescale", (x.gain / wanted)[:, None])
        u = builder.graph.op("Mul", [u, rescale])
    return Signal(operators.snake(u), (operators.snake_gain / alpha).astype(np.float32))


def _alpha(op: ops.Snake) -> F32:
    alpha = np.where(np.abs(op.alpha) < _SMALLEST_ALPHA, _SMALLEST_ALPHA, op.alpha)
    return np.asarray(alpha, np.float64).astype(np.float32)
