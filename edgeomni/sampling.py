"""Choosing ids from logits: greedy, temperature, top-k, top-p, repetition penalty on text; seeded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .arrays import F32, F64, I64
from .errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen. The defaults are the published model's: top_k 1, which is greedy.

    `top_k` None or 0 keeps all; filters apply in the order top-k, temperature, top-p (arXiv 1904.09751).
    """

    greedy: bool = False
    temperature: float = 0.9
    top_k: int | None = 1
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise UsageError(f"top_k must be 0 (keep all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie above 0 and at most 1, not {self.top_p}")
        if not self.repetition_penalty > 0:
            raise UsageError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    @property
    def deterministic(self) -> bool:
        return self.greedy or self.temperature == 0 or self.top_k == 1


class Sampler:
    """One turn's choices. Every stream draws one uniform number per frame, so a seed means the same everywhere."""

    def __init__(self, sampling: Sampling) -> None:
        self._options = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def audio(self, logits: F32) -> I64:
        """[K, audio_vocab] -> unshifted ids [K]."""
        if self._options.deterministic:
            return np.asarray(logits.argmax(-1), np.int64)
        draws = self._rng.random(len(logits))
        return np.array([self._draw(row, u) for row, u in zip(logits, draws, strict=True)], np.int64)

    def text(self, logits: F32, seen: Iterable[int] = ()) -> int:
        """[text_vocab] -> id. `seen` are the ids that the repetition penalty (arXiv 1909.05858) counts."""
        if self._options.repetition_penalty != 1.0:
            logits = _penalize(logits, seen, self._options.repetition_penalty)
        if self._options.deterministic:
            return int(logits.argmax())
        return self._draw(logits, self._rng.random())

    def _draw(self, logits: F32, u: float) -> int:
        ids = np.arange(len(logits))
        if (k := self._options.top_k) and k < len(logits):
            ids = np.sort(np.argpartition(logits, -k)[-k:])
        scaled = logits[ids].astype(np.float64) / self._options.temperature
        p = np.exp(scaled - scaled.max())
        p /= p.sum()
        if self._options.top_p < 1:
            p = _nucleus(p, self._options.top_p)
        edges = np.cumsum(p)
        return int(ids[np.searchsorted(edges, u * edges[-1], side="right")])


def _nucleus(p: F64, top_p: float) -> F64:
    order = np.argsort(-p, kind="stable")
    kept = np.cumsum(p[order]) - p[order] < top_p
    out = np.zeros_like(p)
    out[order[kept]] = p[order[kept]]
    return out


def _penalize(logits: F32, seen: Iterable[int], penalty: float) -> F32:
    ids = np.fromiter(set(seen), np.int64)
    out = logits.copy()
    out[ids] = np.where(out[ids] > 0, out[ids] / penalty, out[ids] * penalty)
    return out
