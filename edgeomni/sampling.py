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
    """One turn's choices, from one seeded stream of uniform numbers.

    Each frame draws one number per audio stream, then one for the text while the text runs, so that a seed means the
    same on every engine. Where the choice is deterministic nothing is drawn.
    """

    def __init__(self, rule: Sampling) -> None:
        self.rule = rule
        self._rng = np.random.default_rng(rule.seed)

    def draws(self, streams: int) -> F64:
        """One uniform number in [0, 1) per audio stream, [streams]; zeros where they are not needed."""
        return np.zeros(streams) if self.rule.deterministic else self._rng.random(streams)

    def text(self, logits: F32, seen: Iterable[int] = ()) -> int:
        """[text_vocab] -> id. `seen` are the ids that the repetition penalty (arXiv 1909.05858) counts."""
        if self.rule.repetition_penalty != 1.0:
            logits = _penalize(logits, seen, self.rule.repetition_penalty)
        return choose(logits, 0.0 if self.rule.deterministic else self._rng.random(), self.rule)


def choose(logits: F32, u: float, rule: Sampling) -> int:
    """[V] -> id: the likeliest where `rule` is deterministic, else drawn with the uniform number `u` in [0, 1)."""
    if rule.deterministic:
        return int(logits.argmax())
    ids = np.arange(len(logits))
    if (k := rule.top_k) and k < len(logits):
        ids = np.sort(np.argpartition(logits, -k)[-k:])
    scaled = logits[ids].astype(np.float64) / rule.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if rule.top_p < 1:
        p = _nucleus(p, rule.top_p)
    edges = np.cumsum(p)
    return int(ids[np.searchsorted(edges, u * edges[-1], side="right")])


def choose_frame(logits: F32, draws: F64, rule: Sampling) -> I64:
    """[K, V] -> ids int64 [K]: `choose` for each stream with its own number of `draws` [K]."""
    if rule.deterministic:
        return np.asarray(logits.argmax(-1), np.int64)
    return np.array([choose(row, u, rule) for row, u in zip(logits, draws, strict=True)], np.int64)


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
