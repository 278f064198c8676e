"""Each metric against a computation of its own: by torch or scipy-free formulas, or by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgeomni.audio import log_mel
from edgeomni.gate import metrics
from edgeomni.spec import FrontEndSpec

RNG = np.random.default_rng(0)


def test_cosine_is_torch_s() -> None:
    a, b = RNG.standard_normal((2, 5, 7))
    expected = torch.cosine_similarity(torch.tensor(a).flatten(), torch.tensor(b).flatten(), dim=0)
    assert metrics.cosine(a, b) == pytest.approx(float(expected), abs=1e-12)
    assert metrics.cosine(a, 3 * a) == pytest.approx(1)
    assert metrics.cosine(np.zeros(3), np.zeros(3)) == 1
    assert metrics.cosine(np.zeros(3), np.ones(3)) == 0


def test_kl_is_torch_s() -> None:
    a, b = RNG.standard_normal((2, 4, 11))
    p, q = (torch.log_softmax(torch.tensor(x), -1) for x in (a, b))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 4
    assert metrics.kl(a, b) == pytest.approx(float(expected), abs=1e-12)
    assert metrics.kl(a, a + 5) == pytest.approx(0, abs=1e-12)  # logits shifted are the same distribution


def test_top1_counts_positions() -> None:
    a = np.eye(4)
    b = np.eye(4)[[0, 1, 2, 0]]
    assert metrics.top1(a, b) == 0.75
    wide = np.array([[[0.0, 1, 2, 9, 4]], [[5.0, 1, 2, 3, 4]], [[0.0, 7, 2, 3, 4]]])  # the largest: 3, 0, 1
    other = np.array([[[0.0, 1, 2, 9, 9.5]], [[5.0, 1, 2, 3, 4]], [[0.0, 7, 2, 3, 4]]])  # 4, 0, 1
    assert metrics.top1(wide, other) == metrics.top1(other, wide) == pytest.approx(2 / 3)


def test_decided_top1_excuses_only_near_ties() -> None:
    reference = np.array([[1.0, 0.99, 0.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.2], [0.0, 0.0, 1.0]])
    other = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert metrics.decided_top1(reference, other, 0.05) == (0.75, 0.25)
    assert metrics.decided_top1(reference, other, 0.0) == (0.5, 0.0)
    wide = np.array([[[4.0, 0, 0, 0, 3.5]], [[0, 9.0, 0, 8.75, 0]], [[0, 0, 2.0, 0, 0]]])
    turned = np.array([[[0, 0, 0, 0, 1.0]], [[0, 0, 0, 1.0, 0]], [[0, 0, 1.0, 0, 0]]])
    shares = {tolerance: metrics.decided_top1(wide, turned, tolerance) for tolerance in (0.2, 0.25, 0.45, 0.5)}
    for tolerance, ties in ((0.2, 0), (0.25, 1), (0.45, 1), (0.5, 2)):  # by no more than the tolerance
        assert shares[tolerance] == pytest.approx((1 - (2 - ties) / 3, ties / 3))


def test_rms() -> None:
    assert metrics.rms([[1.0, 2.0]], [[4.0, 6.0]]) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert metrics.rms([1.0, -2.0], [1.0, -2.0]) == 0


@pytest.mark.parametrize("decibels", [10.0, 45.0, 60.0])
def test_si_sdr_finds_the_noise_that_was_added(decibels: float) -> None:
    wave = np.sin(np.arange(4800) / 7)
    noise = RNG.standard_normal(4800)
    noise -= wave * (noise @ wave) / (wave @ wave)  # orthogonal, so that the ratio is exact
    noise *= np.linalg.norm(wave) / np.linalg.norm(noise) / 10 ** (decibels / 20)
    assert metrics.si_sdr(wave, 0.3 * (wave + noise)) == pytest.approx(decibels, abs=1e-6)


def test_si_sdr_at_its_edges() -> None:
    wave = np.sin(np.arange(100.0))
    assert metrics.si_sdr(wave, wave) == metrics.si_sdr(wave, 2 * wave) == metrics.si_sdr(wave, -wave / 4) == math.inf
    assert metrics.si_sdr(np.zeros(100), wave) == -math.inf
    assert metrics.si_sdr(wave, np.zeros(100)) == -math.inf
    assert math.isnan(metrics.si_sdr(wave, np.full(100, np.nan)))


def test_log_mel_distance_of_a_gain_is_its_decades() -> None:
    """Ten times the amplitude is a hundred times the power: 2 in log10, in every bin above the floor."""
    noise = 0.01 * RNG.standard_normal(24000)
    assert metrics.log_mel_distance(noise, 10 * noise, 24000) == pytest.approx(2, abs=1e-3)
    assert metrics.log_mel_distance(noise, noise, 24000) == 0


def test_log_mel_distance_in_windows_of_25_ms_every_10() -> None:
    """At 24 kHz those are 600 and 240 samples; the front end divides log10 by 4."""
    a, b = (0.01 * RNG.standard_normal((2, 4800))).astype(np.float32)
    spec = FrontEndSpec(sample_rate=24000, n_fft=600, hop=240, n_mels=80)
    expected = 4 * np.abs(log_mel(a, spec, 21) - log_mel(b, spec, 21)).mean()
    assert metrics.log_mel_distance(a, b, 24000) == pytest.approx(expected, rel=1e-6)
    assert metrics.log_mel_distance(a, b, 24000, n_mels=40) != pytest.approx(expected, rel=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        metrics.cosine(np.ones(3), np.ones(4))
