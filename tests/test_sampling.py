"""Sampling against numbers written out by hand, at every edge of its choices, and against frequencies."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from edgeomni.errors import UsageError
from edgeomni.sampling import Sampler, Sampling, choose, choose_frame

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
"""Of ids 0 to 3; their cumulative edges are 0.5, 0.75, 0.9, 1."""
EIGHTHS = np.log(np.array([4, 2, 1, 1], np.float32) / 8)
"""Probabilities that floating point holds exactly, up to a common factor of their logits."""
ALMOST_1 = float(np.nextafter(1, 0))
HOT = Sampling(temperature=1.0, top_k=None)


def rule(**changes: object) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": None, **changes})  # type: ignore[arg-type]


def frequencies(sampling: Sampling, n: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.text(LOGITS) for _ in range(n)], minlength=4) / n


# --- greedy


@pytest.mark.parametrize("options", [{}, {"greedy": True, "top_k": None}, {"temperature": 0.0, "top_k": None}])
def test_greedy_is_argmax_whatever_was_drawn(options: dict[str, object]) -> None:
    sampler = Sampler(Sampling(**options))  # type: ignore[arg-type]
    assert sampler.rule.deterministic and sampler.draws(7).tolist() == [0] * 7
    logits = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    chosen = choose_frame(logits, np.full(7, 0.999), sampler.rule)
    np.testing.assert_array_equal(chosen, logits.argmax(-1))
    assert chosen.dtype == np.int64 and chosen.shape == (7,)
    assert sampler.text(logits[0]) == choose(logits[0], 0.999, sampler.rule) == logits[0].argmax()


@pytest.mark.parametrize(
    ("options", "deterministic"),
    [
        ({"top_k": 1}, True),
        ({"top_k": 2}, False),
        ({"top_k": 0}, False),
        ({"top_k": None}, False),
        ({"top_k": None, "temperature": 0.0}, True),
        ({"top_k": None, "temperature": 0.01}, False),
        ({"top_k": None, "greedy": True}, True),
    ],
)
def test_what_needs_no_draw(options: dict[str, object], deterministic: bool) -> None:
    assert Sampling(**options).deterministic is deterministic  # type: ignore[arg-type]


def test_the_first_of_equals_is_the_likeliest() -> None:
    ties = np.array([1.0, 3.0, 3.0, 2.0], np.float32)
    assert choose(ties, 0.9, Sampling()) == 1
    assert choose_frame(np.stack([ties, ties[::-1]]), np.zeros(2), Sampling()).tolist() == [1, 1]


# --- drawing


@pytest.mark.parametrize(
    ("u", "chosen"),
    [(0.0, 0), (0.4999, 0), (0.5001, 1), (0.7499, 1), (0.7501, 2), (0.8999, 2), (0.9001, 3), (ALMOST_1, 3)],
)
def test_a_number_picks_the_id_whose_share_it_falls_into(u: float, chosen: int) -> None:
    assert choose(LOGITS, u, HOT) == chosen


def test_a_number_on_an_edge_belongs_to_the_next_id() -> None:
    """Shares are closed on their left: [0, 1/2), [1/2, 1), so that an id without a share is never picked."""
    even = np.zeros(2, np.float32)
    assert [choose(even, u, HOT) for u in (0.0, float(np.nextafter(0.5, 0)), 0.5, ALMOST_1)] == [0, 0, 1, 1]
    never = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert [choose(never, u, HOT) for u in (0.0, 0.4, 0.5, ALMOST_1)] == [1, 1, 3, 3]


def test_temperature_divides_the_logits() -> None:
    """At temperature 1/2 the shares 4:2:1:1 become 16:4:1:1, at temperature 2 their square roots."""
    for temperature, weights in ((0.5, [16, 4, 1, 1]), (2.0, [2, 2**0.5, 1, 1])):
        edges = np.cumsum(weights) / np.sum(weights)
        for i, edge in enumerate(edges):
            assert choose(EIGHTHS, edge - 1e-5, rule(temperature=temperature)) == i
        for i, edge in enumerate(edges[:-1]):
            assert choose(EIGHTHS, edge + 1e-5, rule(temperature=temperature)) == i + 1


def test_large_logits_do_not_overflow() -> None:
    large = np.array([1000.0, 1000.0, -1000.0], np.float32)
    assert [choose(large, u, rule(temperature=0.1)) for u in (0.2, 0.8)] == [0, 1]


# --- top-k


@pytest.mark.parametrize(
    ("top_k", "possible"), [(2, [1, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_likeliest_in_their_order(top_k: int, possible: list[int]) -> None:
    logits = np.array([1.0, 5.0, 4.0, 0.0, 6.0], np.float32)
    for how in (rule(top_k=top_k, temperature=100), rule(top_k=top_k, temperature=100, top_p=0.9999)):
        drawn = [choose(logits, u, how) for u in np.linspace(0, ALMOST_1, 50)]
        assert sorted(set(drawn)) == possible
        assert drawn == sorted(drawn), "shares lie in the order of the ids"
    assert choose(logits, 0.0, rule(top_k=top_k)) == possible[0]


def test_top_k_of_0_and_none_keep_all() -> None:
    for top_k in (0, None):
        assert choose(LOGITS, ALMOST_1, rule(top_k=top_k)) == 3
    assert choose(LOGITS, ALMOST_1, rule(top_k=3)) == 2


def test_top_k_renormalizes_what_it_keeps() -> None:
    assert [choose(LOGITS, u, rule(top_k=2)) for u in (0.66, 0.67)] == [0, 1]


# --- top-p


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4), (1.0, 4)],
)
def test_top_p_keeps_the_fewest_ids_that_reach_it(top_p: float, kept: int) -> None:
    """4:2:1:1 of 8: the first reaches 1/2, two reach 3/4, three 7/8 (of equals the first id comes first)."""
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        logits = np.empty(4, np.float32)
        logits[order] = EIGHTHS
        drawn = {choose(logits, u, rule(top_p=top_p)) for u in np.linspace(0, ALMOST_1, 41)}
        ranked = order[:2] + sorted(order[2:])
        assert drawn == set(ranked[:kept])


def test_top_p_that_is_reached_exactly_needs_no_further_id() -> None:
    even = np.zeros(4, np.float32)
    for top_p, kept in ((0.25, [0]), (0.5, [0, 1]), (0.75, [0, 1, 2])):
        assert {choose(even, u, rule(top_p=top_p)) for u in np.linspace(0, ALMOST_1, 41)} == set(kept)


def test_top_p_renormalizes_what_it_keeps() -> None:
    assert [choose(LOGITS, u, rule(top_p=0.6)) for u in (0.66, 0.67, ALMOST_1)] == [0, 1, 1]


def test_top_p_looks_at_probabilities_after_top_k_and_temperature() -> None:
    """Of 0.5 : 0.25 alone the first has 2/3; at temperature 1/2 it has 4/5."""
    assert choose(LOGITS, ALMOST_1, rule(top_k=2, top_p=0.65)) == 0
    assert choose(LOGITS, ALMOST_1, rule(top_k=2, top_p=0.70)) == 1
    assert choose(LOGITS, ALMOST_1, rule(top_k=2, top_p=0.78, temperature=0.5)) == 0


def test_frequencies_follow_the_probabilities() -> None:
    np.testing.assert_allclose(frequencies(rule(seed=1)), [0.5, 0.25, 0.15, 0.1], atol=0.03)
    np.testing.assert_allclose(frequencies(rule(top_k=2, seed=1)), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    cold = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(frequencies(rule(temperature=0.5, seed=1)), cold / cold.sum(), atol=0.03)


# --- frames


def test_each_stream_is_chosen_with_its_own_number() -> None:
    draws = np.array([0.1, 0.6, 0.8, 0.95])
    assert choose_frame(np.stack([LOGITS] * 4), draws, HOT).tolist() == [0, 1, 2, 3]
    shifted = np.stack([np.roll(LOGITS, k) for k in range(4)])
    chosen = choose_frame(shifted, draws, HOT)
    assert chosen.tolist() == [choose(shifted[k], draws[k], HOT) for k in range(4)] and chosen.dtype == np.int64


def test_a_draw_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        choose_frame(np.stack([LOGITS] * 3), np.zeros(2), HOT)


# --- a turn's numbers


def test_a_seed_names_one_stream_of_numbers() -> None:
    """numpy's default generator: three numbers for the audio, one for the text, and so on."""
    sampler, numbers = Sampler(rule(seed=9)), np.random.default_rng(9).random(8)
    for i in (0, 4):
        np.testing.assert_array_equal(sampler.draws(3), numbers[i : i + 3])
        assert sampler.text(LOGITS) == choose(LOGITS, numbers[i + 3], HOT)


def test_no_seed_is_another_stream_each_time() -> None:
    assert Sampler(rule()).draws(4).tolist() != Sampler(rule()).draws(4).tolist()


# --- repetition penalty


def test_repetition_penalty_counts_only_what_was_seen() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(greedy=True, repetition_penalty=1.5))
    assert sampler.text(logits) == 0 and sampler.text(logits, [0]) == 1 and sampler.text(logits, [0, 1]) == 0
    assert sampler.text(logits, [0, 0, 0]) == 1 and sampler.text(np.array([2.0, 1.0], np.float32), [0, 0]) == 0, (
        "once each"
    )
    assert logits.tolist() == [2.0, np.float32(1.9), -1.0], "the caller's logits are left alone"


def test_a_penalty_lowers_logits_of_either_sign_and_a_reward_raises_them() -> None:
    penalty, reward = (Sampler(Sampling(greedy=True, repetition_penalty=p)) for p in (2.0, 0.5))
    below_zero = np.array([-1.0, -1.5], np.float32)
    assert penalty.text(below_zero, [0]) == 1, "-1 becomes -2"
    assert penalty.text(below_zero, []) == penalty.text(below_zero, [1]) == 0
    assert reward.text(below_zero, [1]) == 1, "-1.5 becomes -0.75"
    assert reward.text(np.array([1.0, 1.5], np.float32), [0]) == 0, "1 becomes 2"
    assert penalty.text(np.array([0.0, -0.1], np.float32), [0]) == 0, "0 stays 0"


def test_a_penalty_of_1_changes_nothing() -> None:
    assert Sampler(Sampling(greedy=True)).text(np.array([2.0, 1.9], np.float32), [0]) == 0


def test_a_penalty_comes_before_the_draw() -> None:
    """A penalty of 4 makes log 1/2 four times lower: 1/16 against 1/4, which are shares of 0.2 and 0.8."""
    two = np.log(np.array([0.5, 0.25], np.float32))
    sampler = Sampler(rule(repetition_penalty=4.0, seed=0))
    counts = np.bincount([sampler.text(two, [0]) for _ in range(2000)], minlength=2) / 2000
    np.testing.assert_allclose(counts, [0.2, 0.8], atol=0.03)


# --- what makes no sense


NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "temperature": [-1.0, NAN, INF, 1e-300, 1e-45, 9.99e-4, 100.1, True, "1"],
    "top_k": [-1, 2**31, 1.5, True, "1"],
    "top_p": [0.0, -0.5, 1.0001, NAN, True, "1"],
    "repetition_penalty": [0.0, 0.0999, 10.01, NAN, INF, 1e-300, True, "1"],
    "seed": [-1, 2**63, 0.5, True, "1"],
}
RIGHT: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-3, 1, 100.0, np.float32(0.5)],
    "top_k": [None, 0, 1, 2**31 - 1, np.int64(3)],
    "top_p": [1e-9, 0.5, 1.0, 1],
    "repetition_penalty": [0.1, 1, 10.0],
    "seed": [None, 0, 2**63 - 1, np.int32(7)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_nonsense_is_a_usage_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} must .*{re.escape(repr(value))}"):
        Sampling(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_every_value_within_the_bounds_samples(name: str, value: Any) -> None:
    sampler = Sampler(Sampling(**{"temperature": 1.0, "top_k": 0, name: value}))
    assert 0 <= sampler.text(LOGITS, [1]) < 4
