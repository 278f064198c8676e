"""Changes that a model should not mind: speed, room, noise, volume, masks on the log-mel, wrong codes before its own.

Everything is decided by the configuration and a seed: the same two give the same samples again, in any process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import soxr

from .. import audio
from ..arrays import F32, F64, I32
from ..errors import TrainError
from ..spec import TokenLayout
from ..tokens import shift_audio

Range = tuple[float, float]
SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3")
"""Suffixes of the files in a noise folder that are taken for recordings."""
_SPEED, _ROOM, _NOISE, _VOLUME, _MEL, _CODES, _WRITTEN, _EDITS = range(8)
"""Part of a random generator's seed, so that no change depends on whether another is made."""
_QUIETEST = 10 * audio.SILENCE_PEAK
"""Peak below which volume is not lowered."""
_NOISES_KEPT = 32
"""Recordings of noise that stay in memory."""


@dataclass(frozen=True)
class AugmentConfig:
    """What is changed: every chance (0 to 1) is the part of the recordings that it happens to. By default nothing is.

    Ranges are (lowest, highest), drawn from evenly. Raises TrainError for values that make no sense.
    """

    speed_chance: float = 0.0
    speed: Range = (0.9, 1.1)
    """Factor of tempo and pitch: 1.1 makes a recording a tenth faster."""
    room_chance: float = 0.0
    room_rt60_s: Range = (0.1, 0.5)
    """Seconds in which the echo of a room falls by 60 dB."""
    room_direct_db: Range = (0.0, 15.0)
    """Energy of the direct sound over that of the echo."""
    noise_chance: float = 0.0
    noise_snr_db: Range = (5.0, 30.0)
    """Power of the recording over that of the noise."""
    noise_folder: str = ""
    """Recordings of noise, used beside white and pink noise; "" for none."""
    volume_chance: float = 0.0
    volume_db: Range = (-12.0, 6.0)
    mel_chance: float = 0.0
    """SpecAugment (arXiv 1904.08779); the masks' numbers and widths are those of its mild policy for Switchboard."""
    time_masks: int = 2
    time_width: int = 70
    """Mel frames that one mask covers at most."""
    time_share: float = 0.2
    """Part of the recording that one mask covers at most."""
    frequency_masks: int = 2
    frequency_width: int = 15
    """Mel bands that one mask covers at most."""
    written_chance: float = 0.0
    """Part of the recordings in whose place the model is given what they say, written (as JOIST, arXiv 2210.07353)."""
    written_gap: Range = (2.0, 12.0)
    """LLM frames of padding before each id, and after the last, of a recording that is written."""
    written_edit_share: float = 0.0
    """Share of the ids of a written transcript (task asr) that are dropped, replaced by any other text id or exchanged
    with the next, in prompt and answer alike: what is written is to be copied, not what would be expected."""
    code_share: float = 0.0
    """Share of an answer's codes that the model reads wrong in training, so that it speaks on after a mistake."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name != "noise_folder"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers) or list(numbers) != sorted(numbers):
                raise TrainError(f"augment.{name} is {value}; it must be finite, and a range its lower end first")
            if name.endswith(("_chance", "_share")) and not 0 <= value <= 1:
                raise TrainError(f"augment.{name} is {value}; it must be within 0 and 1")
            if name.endswith(("_masks", "_width")) and value < 0:
                raise TrainError(f"augment.{name} is {value}; it must be 0 or more")
        if self.speed[0] < 0.5 or self.speed[1] > 2:
            raise TrainError(f"augment.speed is {self.speed}; speech is understood within 0.5 and 2")
        if self.room_rt60_s[0] <= 0:
            raise TrainError(f"augment.room_rt60_s is {self.room_rt60_s}; it must be above 0 seconds")


class Augmenter:
    """Applies a configuration. Raises TrainError where its noise folder does not exist or holds no recording."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.noises = _recordings(config.noise_folder) if config.noise_folder else []

    def samples(self, x: F32, rate: int, seed: int, longest: int | None = None) -> F32:
        """A changed copy of samples [S] at `rate` Hz: float32 [S / speed], never silent, and finite.

        `longest`: samples that the model has room for; the speed is chosen so that they suffice, if they did before.
        A change that would leave nothing to hear is left out. Raises AudioError for samples that are no recording,
        as edgeomni.audio.as_samples does, and for a recording of noise that cannot be read.
        """
        config, x = self.config, audio.as_samples(x)
        slowest = len(x) / longest if longest is not None and len(x) <= longest else 0.0
        steps: tuple[tuple[int, float, Callable[[F32, np.random.Generator], F32]], ...] = (
            (_SPEED, config.speed_chance, lambda y, rng: _speed(y, max(slowest, rng.uniform(*config.speed)), longest)),
            (_ROOM, config.room_chance, lambda y, rng: _room(y, rate, config, rng)),
            (_NOISE, config.noise_chance, lambda y, rng: self._noise(y, rate, rng)),
            (_VOLUME, config.volume_chance, lambda y, rng: _volume(y, rng.uniform(*config.volume_db))),
        )
        for kind, chance, change in steps:
            rng = np.random.default_rng([seed, kind])
            if rng.random() < chance:
                x = _heard(np.asarray(change(x, rng), np.float32), x)
        return x

    def mel(self, m: F32, frames: int, seed: int) -> F32:
        """A masked copy of a log-mel [n_mels, t], of which the first `frames` are the recording (the rest is padding).

        Masks hold the recording's mean. However many they are, a part of it stays to be heard.
        """
        config, rng = self.config, np.random.default_rng([seed, _MEL])
        out = np.array(m, np.float32)
        if rng.random() >= config.mel_chance:
            return out
        bands, mean = len(m), m[:, :frames].mean() if frames else 0.0
        most = min(config.time_width, int(config.time_share * frames), frames // (config.time_masks + 1))
        for _ in range(config.time_masks):
            out[:, _span(most, frames, rng)] = mean
        most = min(config.frequency_width, bands // (config.frequency_masks + 1))
        for _ in range(config.frequency_masks):
            out[_span(most, bands, rng), :frames] = mean
        return out

    def written(self, ids: Sequence[int], layout: TokenLayout, seed: int, longest: int) -> I32 | None:
        """A recording's place on the text stream, int32 [F], where it is to be written; None where it is to be heard.

        `ids`: text ids of what is said. They stand in order, with as much padding between them as words that are spoken
        have. None too where there is nothing to write, or it would take more than `longest` LLM frames.
        """
        rng = np.random.default_rng([seed, _WRITTEN])
        if rng.random() >= self.config.written_chance or not len(ids):
            return None
        low, high = (round(frames) for frames in self.config.written_gap)
        places = np.cumsum(rng.integers(low, high + 1, len(ids)) + 1) - 1
        out = np.full(places[-1] + 1 + rng.integers(low, high + 1), layout.pad_t, np.int32)
        out[places] = ids
        return out if len(out) <= longest else None

    def edited(self, ids: Sequence[int], layout: TokenLayout, seed: int) -> list[int]:
        """Text ids of a transcript with `written_edit_share` of them changed, each way as likely; never none at all."""
        rng, left, out = np.random.default_rng([seed, _EDITS]), list(ids), list[int]()
        while left:
            first = left.pop(0)
            kind = rng.integers(3) if rng.random() < self.config.written_edit_share else -1
            if kind == 1:
                first = int(rng.integers(layout.eot))
            elif kind == 2 and left:
                first, left[0] = left[0], first
            if kind != 0:
                out.append(first)
        return out or list(ids)

    def codes(self, ids: I32, layout: TokenLayout, seed: int) -> I32:
        """A copy of ids [K+1, T] of the joint vocabulary (frames.Frames) with `code_share` of the codes drawn anew.

        Each is drawn evenly from the codebook of its stream. Text and special ids stay.
        """
        if not self.config.code_share:
            return ids
        rng, out = np.random.default_rng([seed, _CODES]), ids.copy()
        shifts = shift_audio(layout, np.zeros((layout.streams, 1), np.int32))
        audio = out[: layout.streams]
        codes = (audio >= shifts) & (audio < shifts + layout.codebook_size)
        changed = codes & (rng.random(audio.shape) < self.config.code_share)
        audio[changed] = (shifts + rng.integers(layout.codebook_size, size=audio.shape))[changed]
        return out

    def _noise(self, x: F32, rate: int, rng: np.random.Generator) -> F32:
        """Samples with noise of one kind, each as likely: white, pink, a recording where there are any."""
        kind = rng.integers(3 if self.noises else 2)
        if kind == 2:
            noise: F32 | F64 = _part(_recording(self.noises[rng.integers(len(self.noises))], rate), len(x), rng)
        else:
            noise = white(len(x), rng) if kind == 0 else pink(len(x), rng)
        power = float(np.mean(np.square(noise, dtype=np.float64)))
        if not power:
            return x
        wanted = float(np.mean(np.square(x, dtype=np.float64))) / 10 ** (rng.uniform(*self.config.noise_snr_db) / 10)
        return np.asarray(x + math.sqrt(wanted / power) * noise, np.float32)


def white(count: int, rng: np.random.Generator) -> F64:
    """Noise of the same power at every frequency, [count]."""
    return rng.standard_normal(count)


def pink(count: int, rng: np.random.Generator) -> F64:
    """Noise whose power falls by 3 dB per octave, [count]; it has no constant part unless it is one sample long."""
    size = _fast(count)
    spectrum = np.fft.rfft(white(size, rng))
    if len(spectrum) > 1:
        spectrum *= np.concatenate([[0.0], np.arange(1, len(spectrum)) ** -0.5])
    noise = np.fft.irfft(spectrum, size)[:count]
    return noise - noise.mean() if count > 1 else noise


def _fast(count: int) -> int:
    """The next power of two: transforms of other lengths can take ten times as long."""
    return 1 << max(0, count - 1).bit_length()


def impulse_response(rate: int, rt60_s: float, direct_db: float, rng: np.random.Generator) -> F64:
    """A room's answer to a click: 1, then Gaussian noise that decays by 60 dB in `rt60_s`, `direct_db` below it.

    This is Polack's model ("La transmission de l'énergie sonore dans les salles", thesis, Le Mans, 1988) of
    diffuse reverberation; it has no single reflections.
    """
    times = np.arange(1, max(2, round(rt60_s * rate))) / rate
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / rt60_s)
    tail *= math.sqrt(10 ** (-direct_db / 10) / np.sum(tail**2))
    return np.concatenate([[1.0], tail])


def _speed(x: F32, speed: float, longest: int | None) -> F32:
    faster = np.asarray(soxr.resample(x, speed, 1.0), np.float32)
    return faster if longest is None else faster[: max(longest, len(x))]


def _room(x: F32, rate: int, config: AugmentConfig, rng: np.random.Generator) -> F32:
    """As heard in a room, with the power and the length that it had; the echo after its end is cut off."""
    response = impulse_response(rate, rng.uniform(*config.room_rt60_s), rng.uniform(*config.room_direct_db), rng)
    size = _fast(len(x) + len(response) - 1)
    wet = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(response, size), size)[: len(x)]
    power = float(np.sum(wet**2))
    return np.asarray(wet * math.sqrt(np.sum(np.square(x, dtype=np.float64)) / power) if power else x, np.float32)


def _volume(x: F32, gain_db: float) -> F32:
    """Louder or quieter, but neither clipped nor silenced."""
    peak = float(np.abs(x).max())
    gain = min(max(10 ** (gain_db / 20), min(1.0, _QUIETEST / peak)), max(1.0, 1 / peak))
    return np.asarray(x * np.float32(gain), np.float32)


def _heard(new: F32, old: F32) -> F32:
    """`new` if it is a recording, else `old`."""
    good = len(new) > 0 and bool(np.isfinite(new).all())
    return new if good and audio.SILENCE_PEAK <= np.abs(new).max() <= audio.LOUDEST else old


def _span(most: int, size: int, rng: np.random.Generator) -> slice:
    """A width of 0 to `most`, then its place: both evenly drawn, as the paper has it."""
    width = int(rng.integers(0, most + 1))
    start = int(rng.integers(0, size - width + 1))
    return slice(start, start + width)


def _part(noise: F32, count: int, rng: np.random.Generator) -> F32:
    """`count` samples from anywhere in a recording, which is repeated where it is too short."""
    start = int(rng.integers(len(noise)))
    return np.take(noise, np.arange(start, start + count), mode="wrap")


def _recordings(folder: str) -> list[Path]:
    if not Path(folder).is_dir():
        raise TrainError(f"augment.noise_folder {folder}: no such folder; give one with recordings of noise")
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SOUND_FILES)
    if not found:
        raise TrainError(f"augment.noise_folder {folder} holds no sound file ({', '.join(SOUND_FILES)})")
    return found


@lru_cache(maxsize=_NOISES_KEPT)
def _recording(path: Path, rate: int) -> F32:
    return audio.read(path, rate)
