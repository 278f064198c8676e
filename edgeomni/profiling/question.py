"""A synthesized stand-in for a spoken question: a sequence of vowels, by formants. No recording of anybody."""

from __future__ import annotations

import numpy as np

from ..arrays import F32, F64

VOWELS_HZ = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""First three formants of the vowels in hot, heed, who'd, head, hawed (Peterson and Barney 1952, men)."""
BANDWIDTHS_HZ = (80, 100, 140)
SYLLABLE_S = 0.25
PITCH_HZ = (105, 150)
"""Rises to its end, as a question does."""
PEAK = 0.5


def spoken_question(seconds: float, rate: int = 16000) -> F32:
    """Deterministic vowels, mono float32 [seconds * rate], peak 0.5: harmonics of a rising pitch under formants."""
    t = np.arange(int(seconds * rate)) / rate
    pitch = np.interp(t, [0, seconds], PITCH_HZ) * (1 + 0.01 * np.sin(2 * np.pi * 5 * t))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = _tracks(t)
    wave = np.zeros_like(t)
    for harmonic in range(1, int(4000 / PITCH_HZ[1])):
        wave += _gain(harmonic * pitch, formants) / harmonic * np.sin(harmonic * phase)
    wave *= np.abs(np.sin(np.pi * t / SYLLABLE_S)) ** 0.5
    return np.asarray(wave * (PEAK / np.abs(wave).max()), np.float32)


def _tracks(t: F64) -> F64:
    """Formants over time [3, S], gliding from one vowel's middle to the next."""
    count = int(t[-1] / SYLLABLE_S) + 2
    middles = (np.arange(count) + 0.5) * SYLLABLE_S
    targets = np.array([VOWELS_HZ[i % len(VOWELS_HZ)] for i in range(count)], float)
    return np.stack([np.interp(t, middles, targets[:, i]) for i in range(3)])


def _gain(hz: F64, formants: F64) -> F64:
    """Sum of three resonances' magnitudes at each moment's frequency, [S]."""
    widths = np.array(BANDWIDTHS_HZ)[:, None]
    return np.asarray((1 / (1 + ((hz - formants) / widths) ** 2)).sum(0))
