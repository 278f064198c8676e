"""Sampling against scipy-free, written-out expectations and frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from edgeomni.errors import UsageError
from edgeomni.sampling import Sampler, Sampling, choose_frame

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def frequencies(sampling: Sampling, n: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.text(LOGITS) for _ in range(n)], minlength=4) / n


@pytest.mark.parametrize("options", [{}, {"greedy": True, "top_k": None}, {"temperature": 0.0, "top_k": None}])
def test_greedy_is_argmax(options: dict[str, object]) -> None:
    sampler = Sampler(Sampling(**options))  # type: ignore[arg-type]
    logits = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    np.testing.assert_array_equal(choose_frame(logits, sampler.draws(7), sampler.rule), logits.argmax(-1))
    assert sampler.text(logits[0]) == logits[0].argmax()


def test_frequencies_follow_the_probabilities() -> None:
    plain = frequencies(Sampling(temperature=1.0, top_k=0, seed=1))
    np.testing.assert_allclose(plain, [0.5, 0.25, 0.15, 0.1], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(temperature=1.0, top_k=2, seed=1)), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(
        frequencies(Sampling(temperature=1.0, top_k=0, top_p=0.6, seed=1)), [2 / 3, 1 / 3, 0, 0], atol=0.03
    )
    cold = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(frequencies(Sampling(temperature=0.5, top_k=0, seed=1)), cold / cold.sum(), atol=0.03)


def test_repetition_penalty_counts_only_what_was_seen() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(greedy=True, repetition_penalty=1.5))
    assert sampler.text(logits) == 0 and sampler.text(logits, [0]) == 1 and sampler.text(logits, [0, 1]) == 0
    assert logits.tolist() == [2.0, np.float32(1.9), -1.0], "the caller's logits are left alone"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"temperature": float("nan")},
    ],
)
def test_nonsense_is_a_usage_error(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
