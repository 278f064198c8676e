"""Sampling against scipy-free, written-out expectations and frequencies."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from edgeomni.errors import UsageError
from edgeomni.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def frequencies(sampling: Sampling, n: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.text(LOGITS) for _ in range(n)], minlength=4) / n


@pytest.mark.parametrize("options", [{}, {"greedy": True, "top_k": None}, {"temperature": 0.0, "top_k": None}])
def test_greedy_is_argmax(options: dict[str, object]) -> None:
    sampler = Sampler(Sampling(**options))  # type: ignore[arg-type]
    logits = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    np.testing.assert_array_equal(sampler.audio(logits), logits.argmax(-1))
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
