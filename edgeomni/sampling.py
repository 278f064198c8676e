"""Choosing ids from logits: greedy, temperature, top-k, top-p, repetition penalty on text; seeded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from .arrays import F32, F64, I64
from .errors import UsageError

TEMPERATURES = (1e-3, 100.0)
"""Temperatures accepted besides 0, which is greedy. Below, logits divided by it overflow; above, all ids are alike."""
PENALTIES = (0.1, 10.0)
"""Repetition penalties accepted; useful ones lie between 1 and 2."""
MOST_IDS = 2**31 - 1
LARGEST_SEED = 2**63 - 1


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises UsageError for a seed that is no whole number from 0 to LARGEST_SEED."""
    if not _is_whole(seed, 0, LARGEST_SEED):
        raise UsageError(f"{name} must be a whole number from 0 to 2**63 - 1, not {seed!r}")


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen. The defaults are the published model's: top_k 1, which is greedy.

    `top_k` None or 0 keeps all; filters apply in the order top-k, temperature, top-p (arXiv 1904.09751).
    `temperature` is 0 (greedy) or within TEMPERATURES, `repetition_penalty` within PENALTIES, `top_p` above 0 and at
    most 1, `seed` from 0 to 2**63 - 1. Raises UsageError that names the value otherwise.
    """

    greedy: bool = False
    temperature: float = 0.9
    top_k: int | None = 1
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        coldest, hottest = TEMPERATURES
        if not _is_number(self.temperature) or not (self.temperature == 0 or coldest <= self.temperature <= hottest):
            raise UsageError(
                f"temperature must lie between {coldest:g} and {hottest:g}, not {self.temperature!r}; "
                "for the likeliest id always, say --greedy (or temperature 0)"
            )
        if self.top_k is not None and not _is_whole(self.top_k, 0, MOST_IDS):
            raise UsageError(f"top_k must be a whole number from 0 (keep all) to {MOST_IDS}, not {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie above 0 and be at most 1, not {self.top_p!r}")
        weakest, strongest = PENALTIES
        if not _is_number(self.repetition_penalty) or not weakest <= self.repetition_penalty <= strongest:
            raise UsageError(
                f"repetition_penalty must lie between {weakest:g} and {strongest:g} (1 is none), "
                f"not {self.repetition_penalty!r}"
            )
        if self.seed is not None:
            check_seed(self.seed)

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
