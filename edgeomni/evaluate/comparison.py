"""Two sources on the same samples: the difference of each figure, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..arrays import F64
from ..errors import UsageError
from ..sampling import check_seed
from ..spec import Task
from .metrics import less_is_better
from .result import Evaluation, Row

ROUNDS = 2000
CONFIDENCE = 0.95
FEW = 10
"""Samples under which a bootstrap interval is too narrow to go by: of one sample it has no width at all."""
_YARDSTICKS = ("ceiling_", "floor_")
"""Figures that are no property of the sources, and are not compared."""
_BLOCK = 1 << 20
"""Places drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Difference:
    """Figure `metric` of `task` over the samples that both sources answered; 1 is 100 %.

    `difference` is b - a, and lies between `low` and `high` with the comparison's confidence.
    """

    task: Task
    metric: str
    samples: int
    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval, of `FEW` samples or more, excludes that there is no difference."""
        return self.samples >= FEW and (self.low > 0 or self.high < 0)

    @property
    def points_lost(self) -> float:
        """What b loses against a, in hundredths; negative where b is better."""
        return 100 * (self.difference if less_is_better(self.metric) else 0.0 - self.difference)


@dataclass(frozen=True)
class Comparison:
    """`a` and `b` name the sources."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    rounds: int
    confidence: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "differences": [{**asdict(d), "clear": d.clear} for d in self.differences]}


def compare(
    a: Evaluation, b: Evaluation, *, rounds: int = ROUNDS, confidence: float = CONFIDENCE, seed: int = 0
) -> Comparison:
    """Compares two evaluations of the same test set, sample by sample (those that both could use).

    Raises UsageError where they have no sample in common, or are of different test sets.
    """
    check_seed(seed)
    if rounds < 1 or not 0 < confidence < 1:
        raise UsageError(f"rounds must be 1 or more and confidence between 0 and 1, not {rounds} and {confidence}")
    differences = []
    for task in (task for task in a.tasks if task in b.tasks):
        pairs = _pairs(a.of(task), b.of(task))
        for metric in _metrics(pairs):
            differences.append(_difference(task, metric, pairs, rounds, confidence, seed))
    if not differences:
        raise UsageError(f"{a.source} and {b.source} have answered no sample in common, so they cannot be compared")
    return Comparison(a.source, b.source, tuple(differences), rounds, confidence, seed)


def bootstrap(a: F64, b: F64, rounds: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the difference of two pooled figures over the same samples.

    `a` and `b` [n, 2]: counts and sizes of each sample, whose sums' quotient is the figure. In each round n samples are
    drawn with replacement, the same for both, and the difference b - a of the pooled figures is taken; the interval
    lies between the (1 - confidence) / 2 and (1 + confidence) / 2 quantiles of the rounds, linearly interpolated.
    (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; for word error rates M. Bisani and
    H. Ney, ICASSP 2004.)
    """
    rng, drawn, n = np.random.default_rng(seed), list[F64](), len(a)
    block = max(1, _BLOCK // n)
    for start in range(0, rounds, block):
        places = rng.integers(n, size=(min(block, rounds - start), n))
        sums = [side[places].sum(1) for side in (a, b)]
        drawn.append(sums[1][:, 0] / sums[1][:, 1] - sums[0][:, 0] / sums[0][:, 1])
    low, high = np.quantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _pairs(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    theirs = {row.index: row for row in b}
    pairs = [(row, theirs[row.index]) for row in a if row.index in theirs]
    for one, other in pairs:
        if (one.where, one.reference) != (other.where, other.reference):
            raise UsageError(
                f"sample {one.index} is {one.where} in one evaluation and {other.where} in the other, or has another "
                "reference; compare evaluations of the same test set"
            )
    return pairs


def _metrics(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Figures that every row has on both sides, in their order."""
    names = list(pairs[0][0].scores) if pairs else []
    judged = [name for name in names if not name.startswith(_YARDSTICKS)]
    return [name for name in judged if all(name in row.scores for pair in pairs for row in pair)]


def _difference(
    task: Task, metric: str, pairs: Sequence[tuple[Row, Row]], rounds: int, confidence: float, seed: int
) -> Difference:
    sides = [np.array([pair[side].scores[metric] for pair in pairs], np.float64) for side in (0, 1)]
    a, b = (float(side[:, 0].sum() / side[:, 1].sum()) for side in sides)
    low, high = bootstrap(sides[0], sides[1], rounds, confidence, seed)
    return Difference(task, metric, len(pairs), a, b, b - a, low, high)
