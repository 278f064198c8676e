"""What one recording sounds like to a check: decoded once, measured, and let go."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import F32
from ..errors import EdgeOmniError, SilenceError
from .sample import Clip

FULL_SCALE = 0.999
"""From this level on (of 1) a sample stands at the recorder's limit."""
CLIPPED_RUN = 3
"""So many samples in a row at the limit are a cut-off wave; a loud but whole one touches it with one or two."""


@dataclass(frozen=True)
class Heard:
    """`seconds` and `rate` in Hz: 0 where the recording could not be read; then `fault` says why.

    `digest`: of the decoded samples, "" without them. `clipped_runs`: how often the wave is cut off.
    """

    seconds: float = 0.0
    rate: int = 0
    digest: str = ""
    clipped_runs: int = 0
    fault: str = ""
    silent: bool = False


def listen(clip: Clip) -> Heard:
    """Decodes the clip at its own rate and measures it. What cannot be used is told in the result, never raised."""
    seconds, rate = 0.0, 0
    if isinstance(clip.source, Path) and not clip.source.is_file():
        return Heard(fault=f"{clip.name}: no such sound file")
    try:
        info = clip.info()
        seconds, rate = info.seconds, info.sample_rate
        samples = clip.read(rate)
    except SilenceError as exc:
        return Heard(seconds, rate, fault=str(exc), silent=True)
    except EdgeOmniError as exc:  # what makes the bytes of a clip may fail in its own way
        return Heard(rate=rate, fault=str(exc))
    digest = hashlib.blake2b(samples.tobytes(), digest_size=16, person=str(rate).encode()).hexdigest()
    return Heard(len(samples) / rate, rate, digest, clipped_runs(samples))


def clipped_runs(samples: F32) -> int:
    """Runs of `CLIPPED_RUN` or more samples at full scale or beyond, in samples [S]; each run counts once."""
    full = np.concatenate([[0], np.abs(samples) >= FULL_SCALE, [0]]).astype(np.int8)
    starts, ends = (np.flatnonzero(np.diff(full) == step) for step in (1, -1))
    return int((ends - starts >= CLIPPED_RUN).sum())
