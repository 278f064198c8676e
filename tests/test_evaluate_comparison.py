"""Two evaluations of one test set: differences, and the bootstrap against a second implementation and known cases."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgeomni.errors import UsageError
from edgeomni.evaluate import Evaluation, compare
from edgeomni.evaluate.comparison import bootstrap
from edgeomni.evaluate.metrics import Share
from edgeomni.evaluate.report import comparison_table
from edgeomni.evaluate.result import Row


def evaluation(
    name: str, scores: Sequence[dict[str, tuple[float, float]]], task: Any = "tt", **places: int
) -> Evaluation:
    first = places.get("first", 0)
    rows = [
        Row(
            first + i,
            task,
            f"t:{first + i}",
            "r",
            "",
            None,
            None,
            None,
            "eot",
            {k: Share(*v) for k, v in s.items()},
            {},
        )
        for i, s in enumerate(scores)
    ]
    return Evaluation(name, tuple(rows))


def right(*answers: int) -> list[dict[str, tuple[float, float]]]:
    return [{"exact": (answer, 1)} for answer in answers]


def test_the_difference_is_b_minus_a_with_the_sources_named() -> None:
    found = compare(evaluation("fp32", right(1, 1, 1, 0)), evaluation("int4", right(1, 0, 0, 0)))
    (only,) = found.differences
    assert (found.a, found.b, found.confidence) == ("fp32", "int4", 0.95)
    assert (only.task, only.metric, only.samples, only.a, only.b, only.difference) == (
        "tt",
        "exact",
        4,
        0.75,
        0.25,
        -0.5,
    )
    assert -1 <= only.low <= -0.5 <= only.high <= 0 and only.points_lost == 50


def test_an_error_rate_that_rises_is_a_loss() -> None:
    """2 errors in 10 words against 5 in 10: pooled, not averaged over the samples (0.1 and 0.55)."""
    a = evaluation("a", [{"wer": (0, 2)}, {"wer": (2, 8)}], "asr")
    b = evaluation("b", [{"wer": (2, 2)}, {"wer": (3, 8)}], "asr")
    only = compare(a, b).differences[0]
    assert (only.a, only.b) == (0.2, 0.5) and only.points_lost == pytest.approx(30)
    assert compare(b, a).differences[0].points_lost == pytest.approx(-30)


def test_the_same_answers_have_no_difference_and_no_width() -> None:
    same = right(1, 0, 1, 1, 0)
    only = compare(evaluation("a", same), evaluation("b", same)).differences[0]
    assert (only.difference, only.low, only.high, only.clear) == (0, 0, 0, False)


def test_all_right_against_all_wrong_is_certain() -> None:
    only = compare(evaluation("a", right(*[1] * 10)), evaluation("b", right(*[0] * 10))).differences[0]
    assert (only.low, only.high, only.clear) == (-1, -1, True)
    better = compare(evaluation("a", right(*[0] * 10)), evaluation("b", right(*[1] * 10))).differences[0]
    assert (better.low, better.high, better.clear) == (1, 1, True)
    few = compare(evaluation("a", right(*[0] * 9)), evaluation("b", right(*[1] * 9))).differences[0]
    assert (few.low, few.high, few.clear) == (1, 1, False), "nine samples are too few for a verdict"


@pytest.mark.parametrize(
    ("metric", "a", "b", "said"),
    [
        ("exact", 0, 1, "B is better"),
        ("exact", 1, 0, "A is better"),
        ("wer", 0, 1, "A is better"),
        ("wer", 1, 0, "B is better"),
        ("wer", 1, 1, "no clear difference"),
    ],
)
def test_the_table_says_which_is_better(metric: str, a: int, b: int, said: str) -> None:
    sides = [evaluation(name, [{metric: (got, 1)}] * 10, "asr") for name, got in (("a", a), ("b", b))]
    table = comparison_table(compare(*sides))
    assert [str(cell) for cell in table.columns[-1].cells] == [said]


def test_the_pairing_counts() -> None:
    """Both sources are right on the same half: without pairing the interval would be wide, with it it has no width."""
    half = right(*[1, 0] * 20)
    assert compare(evaluation("a", half), evaluation("b", half)).differences[0].high == 0
    other = compare(evaluation("a", half), evaluation("b", half[::-1])).differences[0]
    assert other.difference == 0 and other.high - other.low > 0.3


def plain_bootstrap(a: list[tuple[float, float]], b: list[tuple[float, float]], rounds: int) -> tuple[float, float]:
    """The same written down plainly, with the standard library's random numbers and nearest ranks."""
    draw, found = random.Random(1), []
    for _ in range(rounds):
        places = [draw.randrange(len(a)) for _ in a]
        rates = [sum(side[i][0] for i in places) / sum(side[i][1] for i in places) for side in (a, b)]
        found.append(rates[1] - rates[0])
    found.sort()
    return found[int(0.025 * rounds)], found[int(0.975 * rounds)]


def test_the_bootstrap_agrees_with_a_second_implementation() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 12, 60)
    a, b = ([(float(rng.binomial(n, p)), float(n)) for n in sizes] for p in (0.2, 0.35))
    expected = plain_bootstrap(a, b, 4000)
    found = bootstrap(np.array(a), np.array(b), 4000, 0.95, seed=0)
    assert found == pytest.approx(expected, abs=0.01) and found[1] - found[0] > 0.05


def test_the_bootstrap_agrees_with_the_normal_law_for_many_samples() -> None:
    """Differences of single answers are 1, 0, -1; their mean of n = 900 is nearly normal."""
    rng = np.random.default_rng(6)
    differences = rng.choice([-1.0, 0.0, 1.0], 900, p=[0.2, 0.7, 0.1])
    a = np.stack([(differences < 0) * 1.0, np.ones(900)], 1)
    b = np.stack([(differences > 0) * 1.0, np.ones(900)], 1)
    low, high = bootstrap(a, b, 4000, 0.9, seed=2)
    error = 1.645 * differences.std() / 30
    assert (low, high) == pytest.approx((differences.mean() - error, differences.mean() + error), abs=0.003)


def test_the_bootstrap_is_seeded_and_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (np.array([[float(i % k == 0), 1.0] for i in range(50)]) for k in (2, 3))
    first = bootstrap(a, b, 500, 0.95, 7)
    assert first == bootstrap(a, b, 500, 0.95, 7) != bootstrap(a, b, 500, 0.95, 8)
    monkeypatch.setattr("edgeomni.evaluate.comparison._BLOCK", 130)  # two rounds at once
    low, high = bootstrap(a, b, 501, 0.95, 7)
    assert (low, high) == pytest.approx(first, abs=0.05)


def test_only_samples_that_both_could_use_are_compared() -> None:
    a, b = evaluation("a", right(1, 1, 0)), evaluation("b", right(0, 0, 0), first=1)
    only = compare(a, b).differences[0]
    assert (only.samples, only.a, only.b) == (2, 0.5, 0)


def test_ceiling_and_floor_are_not_compared() -> None:
    names = ("exact", "heard_exact", "ceiling_exact", "floor_exact")
    scores = [dict.fromkeys(names, (1.0, 1.0))]
    found = compare(evaluation("a", scores, "ta"), evaluation("b", scores, "ta"))
    assert [d.metric for d in found.differences] == ["exact", "heard_exact"]


def test_tasks_and_figures_that_one_side_lacks_are_left_out() -> None:
    both = [dict.fromkeys(("exact", "heard_exact"), (1.0, 1.0))]
    one, other = evaluation("a", both, "ta"), evaluation("b", right(1), "ta")
    assert [d.metric for d in compare(one, other).differences] == ["exact"]
    assert [d.metric for d in compare(other, one).differences] == ["exact"]


def test_different_test_sets_cannot_be_compared() -> None:
    a = evaluation("a", right(1))
    with pytest.raises(UsageError, match="no sample in common"):
        compare(a, evaluation("b", right(1), "ta"))
    with pytest.raises(UsageError, match="no sample in common"):
        compare(a, evaluation("b", right(1), first=5))
    elsewhere = Evaluation("b", tuple(Row(0, "tt", "u:0", "r", "", None, None, None, "eot", {}, {}) for _ in "1"))
    with pytest.raises(UsageError, match="t:0 in one evaluation and u:0 in the other"):
        compare(a, elsewhere)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"confidence": 1.0}, {"confidence": 0.0}, {"seed": -1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    a = evaluation("a", right(1))
    with pytest.raises(UsageError):
        compare(a, a, **wrong)


def test_the_comparison_as_a_document() -> None:
    found = compare(evaluation("a", right(1, 1)), evaluation("b", right(0, 0)), seed=4).to_dict()
    assert (found["a"], found["b"], found["seed"], found["rounds"]) == ("a", "b", 4, 2000)
    assert found["differences"] == [
        {
            "task": "tt",
            "metric": "exact",
            "samples": 2,
            "a": 1.0,
            "b": 0.0,
            "difference": -1.0,
            "low": -1.0,
            "high": -1.0,
            "clear": False,
        }
    ]
