"""A synthetic sound for where no recording is at hand: the gate judges on it, and exporters calibrate on it."""

from __future__ import annotations

import numpy as np

from .arrays import F32
from .spec import FrontEndSpec


def probe(spec: FrontEndSpec, seconds: float, seed: int) -> F32:
    """A sound with speech's outline where no recording is at hand: gliding harmonics in syllables, a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * spec.sample_rate)) / spec.sample_rate
    pitch = 120 + 40 * np.sin(2 * np.pi * (0.4 + 0.2 * rng.random()) * t)
    phase = 2 * np.pi * np.cumsum(pitch) / spec.sample_rate
    voice = sum(np.sin(h * phase + rng.random()) / h for h in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * t + rng.random()), 0, None)
    out: F32 = (0.15 * voice * syllables + 0.003 * rng.standard_normal(len(t))).astype(np.float32)
    return out
