"""Figures that compare two answers to the same question. All numpy, computed in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import F64
from ..audio import log_mel
from ..spec import FrontEndSpec

_LOG_MEL_SCALE = 4
"""Whisper's log-mel is (log10 + 4) / 4."""


def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Cosine of the angle between two arrays of one shape, flattened; 1 when both are zero, 0 when one is."""
    x, y = _pair(a, b)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norms == 0:
        return 1.0 if not x.any() and not y.any() else 0.0
    return float(x @ y) / norms


def kl(reference: ArrayLike, other: ArrayLike) -> float:
    """Mean Kullback-Leibler divergence KL(reference || other) in nats over logits [..., V]."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def top1(reference: ArrayLike, other: ArrayLike) -> float:
    """Share of positions of logits [..., V] whose largest entry is the same."""
    a, b = np.asarray(reference), np.asarray(other)
    return float((a.argmax(-1) == b.argmax(-1)).mean())


def decided_top1(reference: ArrayLike, other: ArrayLike, tolerance: float) -> tuple[float, float]:
    """(`top1` without near-ties, share of near-ties) over logits [..., V].

    A position counts as a near-tie, and not as a disagreement, where the reference itself prefers its choice to the
    other's by no more than `tolerance`: so little that its own rounding could have turned it.
    """
    a, b = np.asarray(reference), np.asarray(other)
    mine, theirs = a.argmax(-1)[..., None], b.argmax(-1)[..., None]
    margin = (np.take_along_axis(a, mine, -1) - np.take_along_axis(a, theirs, -1))[..., 0]
    differs = (mine != theirs)[..., 0]
    tie = differs & (margin <= tolerance)
    return float(1 - (differs & ~tie).mean()), float(tie.mean())


def rms(a: ArrayLike, b: ArrayLike) -> float:
    """Root mean square of the difference of two arrays of one shape."""
    x, y = _pair(a, b)
    return float(np.sqrt(np.mean((x - y) ** 2)))


def si_sdr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv 1811.02508) of waves [S].

    inf when they are equal up to a gain, -inf when only one of them is silent.
    """
    ref, est = _pair(reference, estimate)
    energy = float(ref @ ref)
    if np.array_equal(ref, est):
        return float("inf")
    if energy == 0 or not est.any():
        return float("-inf")
    target = float(est @ ref) / energy * ref
    noise = est - target
    distortion = float(noise @ noise)
    if distortion == 0:
        return float("inf")
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(float(target @ target) / distortion))


def log_mel_distance(reference: ArrayLike, estimate: ArrayLike, rate: int, n_mels: int = 80) -> float:
    """Mean absolute difference of log10-mel power spectra of waves [S] at `rate` Hz (25 ms windows, 10 ms hop)."""
    ref, est = _pair(reference, estimate)
    spec = FrontEndSpec(sample_rate=rate, n_fft=rate // 40, hop=rate // 100, n_mels=n_mels, window_s=1)
    frames = len(ref) // spec.hop + 1
    a, b = (log_mel(x.astype(np.float32), spec, frames) for x in (ref, est))
    return float(np.abs(a - b).mean()) * _LOG_MEL_SCALE


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[F64, F64]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"cannot compare shapes {x.shape} and {y.shape}")
    return x.ravel(), y.ravel()


def _log_softmax(logits: ArrayLike) -> F64:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    out: F64 = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out
