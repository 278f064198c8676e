"""Sound files for tests of data: a tone whose loudness tells which file it is."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


def tone(level: float, seconds: float = 0.1) -> np.ndarray:
    """float32 samples [S] at 16 kHz with a peak of `level`."""
    times = np.arange(int(RATE * seconds)) / RATE
    return (level * np.sin(2 * np.pi * 440 * times)).astype(np.float32)


def wav(path: Path, level: float = 0.5, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(level, seconds), RATE, subtype="FLOAT", format="WAV")
    return path


def wav_bytes(level: float = 0.5, seconds: float = 0.1) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, tone(level, seconds), RATE, subtype="FLOAT", format="WAV")
    return out.getvalue()


def wav_base64(level: float = 0.5, seconds: float = 0.1) -> str:
    return base64.b64encode(wav_bytes(level, seconds)).decode()
