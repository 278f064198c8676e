"""The synthesized question: loud, repeatable, and the sound that its description gives."""

from __future__ import annotations

import numpy as np
import pytest

from edgeomni.profiling.question import spoken_question


def test_the_question_is_loud_and_repeatable() -> None:
    first, second = spoken_question(1.0), spoken_question(1.0)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (16000,) and first.dtype == np.float32
    assert np.abs(first).max() == pytest.approx(0.5)
    assert spoken_question(0.3, 8000).shape == (2400,)


def band(samples: np.ndarray, low: float, high: float, rate: int = 16000) -> float:
    """Energy between two frequencies."""
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
    hz = np.fft.rfftfreq(len(samples), 1 / rate)
    return float(power[(hz >= low) & (hz < high)].sum())


def test_the_question_has_the_vowels_of_hot_and_heed() -> None:
    """Their first formants are 730 and 270 Hz; harmonics end below 4 kHz."""
    wave = spoken_question(2.0)
    hot, heed = wave[1400:2600], wave[5400:6600]  # the middles of the first two syllables of 0.25 s
    assert band(hot, 600, 1200) > 2 * band(hot, 150, 420)
    assert band(heed, 150, 420) > 4 * band(heed, 600, 1200)
    assert band(wave, 90, 3500) > 0.95 * band(wave, 0, 8000)
    assert band(wave, 4100, 8000) < 1e-4 * band(wave, 0, 8000)


def spelt_out(seconds: float, rate: int) -> np.ndarray:
    """The question once more, harmonic by harmonic: a source that falls with 1/n under three resonances."""
    time = np.arange(int(seconds * rate)) / rate
    pitch = (105 + 45 * time / seconds) * (1 + np.sin(10 * np.pi * time) / 100)
    turns = np.cumsum(pitch) / rate
    vowels = {"hot": (730, 1090, 2440), "heed": (270, 2290, 3010), "who'd": (300, 870, 2240)}
    vowels |= {"head": (530, 1840, 2480), "hawed": (570, 840, 2410)}
    spoken = list(vowels.values()) * 3
    wave = np.zeros(len(time))
    for n in range(1, 26):  # the 25th harmonic of 150 Hz lies at 3750 Hz, the next one would be the last below 4 kHz
        gain = np.zeros(len(time))
        for which, width in enumerate((80, 100, 140)):
            middles = [0.125 + 0.25 * i for i in range(len(spoken))]
            formant = np.interp(time, middles, [v[which] for v in spoken])
            gain += width**2 / (width**2 + (n * pitch - formant) ** 2)
        wave += gain * np.sin(2 * np.pi * n * turns) / n
    wave *= np.sqrt(np.abs(np.sin(4 * np.pi * time)))  # a syllable of 0.25 s is half a period
    return np.asarray(wave / np.abs(wave).max() / 2)


@pytest.mark.parametrize(("seconds", "rate"), [(1.7, 16000), (0.3, 8000)])
def test_the_question_is_the_one_that_its_description_gives(seconds: float, rate: int) -> None:
    np.testing.assert_allclose(spoken_question(seconds, rate), spelt_out(seconds, rate), atol=1e-5)


def test_the_question_pauses_between_syllables() -> None:
    wave = spoken_question(1.0)
    for pause in (4000, 8000, 12000):
        quiet, loud = np.abs(wave[pause - 24 : pause + 24]).max(), np.abs(wave[pause - 2400 : pause - 1600]).max()
        assert quiet < 0.4 * loud and wave[pause] == pytest.approx(0, abs=1e-3)
