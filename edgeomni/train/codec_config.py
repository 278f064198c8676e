"""What a codec training run is told: a TOML document with one table per section, read strictly.

Every key has a default, so that the smallest document is empty. Unknown keys are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..errors import TrainError
from ..schema import Source, parse_toml, read_bytes, typed
from .config_file import to_toml

Count = Annotated[int, Meta(ge=1, le=1 << 24)]
CountOrNone = Annotated[int, Meta(ge=0, le=1 << 24)]
Rate = Annotated[float, Meta(gt=0, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Weight = Annotated[float, Meta(ge=0, le=1e4)]
Sizes = Annotated[tuple[Count, ...], Meta(min_length=1, max_length=16)]

SCRATCH = "scratch"
LARGEST_SEED = 2**32
EVAL_WINDOW, EVAL_BANDS = 1024, 80
"""Of the log-mel distance on held-out recordings, by which codecs are compared."""
MOST_BYTES = 1 << 16
"""Of a configuration file."""


@dataclass(frozen=True)
class CodecSizes:
    """SNAC's sizes, under the names of its config.json (arXiv 2410.14411). Defaults: a small codec for 16 kHz speech.

    Used for training from scratch only: a codec that exists brings its own.
    """

    sampling_rate: Count = 16000
    encoder_dim: Count = 16
    encoder_rates: Sizes = (4, 4, 4, 8)
    latent_dim: Count | None = None
    decoder_dim: Count = 256
    decoder_rates: Sizes = (8, 4, 4, 4)
    attn_window_size: Count | None = None
    codebook_size: Annotated[int, Meta(ge=2, le=1 << 20)] = 512
    codebook_dim: Count = 8
    vq_strides: Sizes = (4, 2, 1)
    noise: bool = False
    depthwise: bool = True

    def __post_init__(self) -> None:
        if math.prod(self.encoder_rates) != math.prod(self.decoder_rates):
            raise TrainError(
                f"encoder_rates {list(self.encoder_rates)} and decoder_rates {list(self.decoder_rates)} have different "
                "products, so the sound would come back at another speed"
            )
        if any(self.vq_strides[0] % stride for stride in self.vq_strides) or self.vq_strides[-1] != 1:
            raise TrainError(f"vq_strides {list(self.vq_strides)} must divide the first of them and end in 1")
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise TrainError(f"decoder_dim {self.decoder_dim} cannot be halved once per decoder rate")

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return math.prod(self.encoder_rates)

    @property
    def unit(self) -> int:
        """Samples that a signal's length must be a multiple of: one id of the slowest level, whole windows."""
        return self.hop * math.lcm(self.vq_strides[0], self.attn_window_size or 1)

    def arguments(self) -> dict[str, Any]:
        """SNAC's keyword arguments, as its config.json holds them."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        latent = self.encoder_dim * 2 ** len(self.encoder_rates)
        return {**plain, "latent_dim": self.latent_dim or latent}


@dataclass(frozen=True)
class DataConfig:
    """`train`: whatever `edgeomni train --data` reads, or folders of sound files. `use`: which recordings of them.

    Relative paths are relative to the configuration's folder. `segment` is in samples. `held_out_s` seconds are kept
    out of training, at most a tenth of all. More than `max_bad` recordings that cannot be read end the run.
    """

    train: list[str] = field(default_factory=list)
    use: Literal["all", "answers"] = "all"
    segment: Count = 8192
    held_out_s: Annotated[float, Meta(ge=0, le=3600)] = 20.0
    max_bad: CountOrNone = 10


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The rate rises over `warmup` steps, stays until `flat` of all steps, and falls as a cosine to `lr_end` of
    itself. `clip`: largest norm of the gradient.
    """

    steps: Count = 4000
    batch: Count = 8
    lr: Rate = 1e-3
    warmup: CountOrNone = 100
    flat: Share = 0.4
    lr_end: Share = 0.03
    weight_decay: Share = 1e-4
    clip: Annotated[float, Meta(gt=0, le=1e4)] = 1.0


@dataclass(frozen=True)
class RunConfig:
    """How the loop runs; `..._every` are steps. `fast` computes depthwise convolutions and snake in another way with
    the same result, which takes less time on a CPU; `compile` is torch.compile of encoder and decoder.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    fast: bool = True
    compile: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    log_every: Count = 50
    validate_every: Count = 250
    save_every: Count = 250


@dataclass(frozen=True)
class QuantizerConfig:
    """Codebooks on the unit sphere, moved by an exponential mean (see codec_quantizer.py).

    From scratch, latents stay unquantized for `start` steps; then k-means over `kmeans_segments` segments starts the
    codebooks. Per step at most `revive` codes, used less than `revive_below` of an even share, move to a latent of the
    batch, until `revive_until` of all steps.
    """

    start: CountOrNone = 300
    decay: Annotated[float, Meta(gt=0, lt=1)] = 0.99
    revive: CountOrNone = 4
    revive_below: Share = 0.03
    revive_until: Share = 0.8
    kmeans_segments: Count = 320
    kmeans_iterations: Count = 12
    init: Literal["lsuv", "default"] = "lsuv"


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, and the spectra (window in samples, mel bands) that they are means over."""

    log_mel: Weight = 1.0
    convergence: Weight = 0.2
    commitment: Weight = 0.05
    windows: Sizes = (256, 512, 1024, 2048)
    mel_bands: Sizes = (24, 40, 80, 80)
    floor: Rate = 1e-4

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.mel_bands):
            raise TrainError(f"{len(self.windows)} windows and {len(self.mel_bands)} mel_bands: give one for each")
        if min(self.windows) < 16 or any(bands > n // 2 for n, bands in zip(self.windows, self.mel_bands, strict=True)):
            raise TrainError("windows need 16 samples or more, and mel_bands at most half of their window's samples")


@dataclass(frozen=True)
class AdversarialConfig:
    """Discriminators, which join at `from_step` (absent: never). Defaults are those of the papers.

    `weight` and `feature_weight` stand to the mean log-mel distance as DAC's 1 and 2 stand to 15 times the sum over its
    seven spectra (arXiv 2306.06546, section 3.4).
    """

    from_step: CountOrNone | None = None
    weight: Weight = 0.01
    feature_weight: Weight = 0.02
    lr: Rate = 1e-4
    channels: Count = 32
    periods: Sizes = (2, 3, 5, 7, 11)
    windows: Sizes = (2048, 1024, 512)


@dataclass(frozen=True)
class CollapseConfig:
    """A level that uses less than `least_share` of its codes for `patience` steps on end stops the run.

    Looked at from `after` steps after the codebooks' start. Use is counted over the last `window` steps; where these
    have fewer ids than there are codes, the share is of the ids.
    """

    least_share: Share = 0.05
    patience: Count = 200
    after: CountOrNone = 200
    window: Count = 100


@dataclass(frozen=True)
class CodecTrainConfig:
    """All of a run. `start`: "scratch", a codec's directory or hub id, or an omni checkpoint whose codec is taken.

    `decoder_only` leaves encoder and codes as they are and trains the decoder alone.
    """

    start: str = SCRATCH
    decoder_only: bool = False
    seed: Annotated[int, Meta(ge=0, lt=LARGEST_SEED)] = 0
    codec: CodecSizes = field(default_factory=CodecSizes)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)

    @property
    def scratch(self) -> bool:
        return self.start == SCRATCH

    def check(self) -> None:
        """Raises TrainError for values that contradict each other across sections."""
        if self.data.segment % self.codec.unit:
            raise TrainError(
                f"data.segment is {self.data.segment}; this codec needs a multiple of {self.codec.unit} samples"
            )
        windows = (*self.loss.windows, *(self.adversarial.windows if self.adversarial.from_step is not None else ()))
        if (longest := max(*windows, EVAL_WINDOW)) > self.data.segment:
            raise TrainError(f"data.segment is {self.data.segment}, shorter than a window of {longest} samples")
        if self.scratch and self.decoder_only:
            raise TrainError("decoder_only needs a trained codec to start from: give --init CODEC")
        if self.scratch and self.optimizer.steps <= self.quantizer.start:
            raise TrainError(
                f"optimizer.steps {self.optimizer.steps} end before quantizer.start {self.quantizer.start}: the "
                "codebooks would never be made; train longer or set quantizer.start lower"
            )


def read_config(path: Path) -> dict[str, Any]:
    """A configuration file as plain data, its relative paths made absolute.

    Raises TrainError for what is no TOML. Whether the keys fit is found out by `to_config`.
    """
    source = _source(str(path))
    data = parse_toml(read_bytes(path, source, MOST_BYTES), source)
    section = data.get("data")
    if isinstance(section, dict) and isinstance(section.get("train"), list):
        section["train"] = [os.path.abspath(path.parent / p) if isinstance(p, str) else p for p in section["train"]]
    start = data.get("start")
    if isinstance(start, str) and (path.parent / start).exists():  # else a hub id, or "scratch"
        data["start"] = os.path.abspath(path.parent / start)
    return data


def to_config(data: Mapping[str, Any], where: str) -> CodecTrainConfig:
    """Plain data -> CodecTrainConfig. Raises TrainError that names `where` and the key at fault."""
    return typed(dict(data), CodecTrainConfig, _source(where))


def written(config: CodecTrainConfig) -> str:
    """The configuration as TOML that `read_config` and `to_config` read back, its relative paths made absolute."""
    train = [os.path.abspath(path) for path in config.data.train]
    start = os.path.abspath(config.start) if os.path.exists(config.start) else config.start
    return to_toml(dataclasses.replace(config, start=start, data=dataclasses.replace(config.data, train=train)))


def _source(where: str) -> Source:
    return Source(where, TrainError, "correct it (docs/train-codec.md lists all keys)")
