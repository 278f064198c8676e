"""Tiny sizes, synthetic sounds and short runs for the tests of codec training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from edgeomni.arrays import F32
from edgeomni.train.codec_config import (
    AdversarialConfig,
    CodecSizes,
    CodecTrainConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    QuantizerConfig,
    RunConfig,
)

RATE = 8000
SIZES = CodecSizes(
    sampling_rate=RATE,
    encoder_dim=6,
    encoder_rates=(4, 4),
    decoder_dim=24,
    decoder_rates=(4, 4),
    codebook_size=16,
    codebook_dim=4,
    vq_strides=(2, 1),
)
CONFIG = CodecTrainConfig(
    codec=SIZES,
    data=DataConfig(train=["unused"], segment=1024, held_out_s=2.0),
    optimizer=OptimizerConfig(steps=70, batch=4, lr=5e-3, warmup=5),
    run=RunConfig(log_every=10, validate_every=35, save_every=70),
    quantizer=QuantizerConfig(start=25, kmeans_segments=24),
    loss=LossConfig(windows=(64, 256), mel_bands=(8, 24), floor=1e-2),
)
ADVERSARY = AdversarialConfig(from_step=0, channels=1, periods=(3,), windows=(128,))


def harmonic(seconds: float, seed: int, rate: int = RATE) -> F32:
    """A gliding tone with harmonics that swells and fades, and a little noise: peak below 1."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(90, 250) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    sound = sum(rng.uniform(0.2, 1) / k * np.sin(k * phase + rng.uniform(0, 6)) for k in range(1, 9))
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 3) * time)
    whole = sound / np.abs(sound).max() * 0.5 * swell + 0.003 * rng.standard_normal(len(time))
    return np.asarray(whole, np.float32)


def sounds(folder: Path, count: int = 10, seconds: float = 2.0) -> Path:
    """`count` sound files of `seconds` each."""
    folder.mkdir(parents=True)
    for i in range(count):
        soundfile.write(folder / f"{i}.wav", harmonic(seconds, i), RATE)
    return folder


def changed(config: CodecTrainConfig = CONFIG, **sections: Any) -> CodecTrainConfig:
    """`config` with keys changed: changed(optimizer={"steps": 3}, seed=1)."""
    new = {k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in sections.items()}
    return replace(config, **new)


def logged(run: Path) -> list[dict[str, Any]]:
    """The run's log without what differs from run to run: the time."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("audio_s_per_s", "seconds")} for record in records]
