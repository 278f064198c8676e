"""Sound in and out: read, check, resample, log-mel. Samples are float32 in [-1, 1], mono."""

from __future__ import annotations

import io
import os
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from .arrays import F32, F64
from .errors import AudioError
from .spec import FrontEndSpec

MAX_CHANNELS = 2
RATES_HZ = (4_000, 96_000)
"""Rates accepted: below is no speech, above is a mislabelled file far more often than a recording of speech."""
SILENCE_PEAK = 1e-4
"""Peak (-80 dBFS) under which a recording holds no speech."""
_MEL_FLOOR, _MEL_RANGE = 1e-10, 8.0
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
"""What streaming writers put in a WAV header when they cannot know the length."""


def read(path: str | os.PathLike[str], rate: int, channel: int | None = None) -> F32:
    """A sound file as mono float32 at `rate` Hz, [samples].

    Two channels are averaged; `channel` (from 0) picks one instead, of any number. Raises AudioError, each with its
    own message, for a file that is missing, empty, no audio, cut off, of zero length, silent, not finite, of more
    than two channels (without `channel`) or of a rate outside `RATES_HZ`.
    """
    file = Path(path)
    samples, source_rate = _decode(file)
    name = str(path)
    mono = _to_mono(name, samples, channel)
    check_rate(source_rate, name)
    check(mono, name)
    return resample(mono, source_rate, rate)


def decode(data: bytes, name: str, channel: int | None = None) -> tuple[F32, int]:
    """The bytes of a sound file, as they come through a pipe: mono float32 [samples], and their rate in Hz.

    A pipe's header need not know the length, so a file that was cut off cannot be told from one that was not.
    Raises AudioError for bytes that are no sound.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as f:
            return _to_mono(name, f.read(dtype="float32", always_2d=True), channel), f.samplerate
    except soundfile.LibsndfileError as exc:
        raise AudioError(
            f"{name}: cannot be read as audio ({exc.error_string}); WAV, FLAC, OGG and MP3 are understood, and raw "
            "PCM with --stdin-format s16le"
        ) from exc


def from_pcm16(data: bytes, name: str) -> F32:
    """Raw 16-bit little-endian mono PCM -> float32 [samples] in [-1, 1). Raises AudioError for half a sample."""
    if len(data) % 2:
        raise AudioError(f"{name}: {len(data)} bytes end within a 16-bit sample; is it s16le?")
    return np.asarray(np.frombuffer(data, "<i2") / 32768, np.float32)


def check_rate(rate: int, name: str) -> None:
    """Raises AudioError where `rate` in Hz is no rate at which speech is recorded."""
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise AudioError(
            f"{name}: sample rate {rate} Hz is not a whole number within {RATES_HZ[0]}-{RATES_HZ[1]} Hz; state the "
            "rate at which it was recorded, or resample it first, for instance with `sox IN.wav -r 16000 OUT.wav`"
        )


def check(samples: F32, name: str = "audio") -> None:
    """Raises AudioError where samples [S] cannot be a question: none at all, not finite, silent, not mono."""
    if samples.ndim != 1:
        raise AudioError(f"{name}: expected mono samples [S], got an array of shape {samples.shape}")
    if not len(samples):
        raise AudioError(f"{name}: has zero length; record again")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: contains NaN or infinite samples; export it again from its source")
    if np.abs(samples).max() < SILENCE_PEAK:
        raise AudioError(f"{name}: is silent (peak under {SILENCE_PEAK:g}); check the microphone")


def resample(samples: F32, source_rate: int, rate: int) -> F32:
    """Band-limited resampling (soxr, high quality)."""
    if source_rate == rate:
        return np.ascontiguousarray(samples, np.float32)
    return np.asarray(soxr.resample(samples, source_rate, rate), np.float32)


def _decode(file: Path) -> tuple[F32, int]:
    if not file.is_file():
        raise AudioError(f"{file}: no such sound file")
    if file.stat().st_size == 0:
        raise AudioError(f"{file}: is empty (0 bytes); record or copy it again")
    _refuse_cut_wav(file)
    try:
        with soundfile.SoundFile(file) as f:
            announced, rate = f.frames, f.samplerate
            samples = f.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as exc:
        raise AudioError(
            f"{file}: cannot be read as audio ({exc.error_string}); WAV, FLAC, OGG and MP3 are understood"
        ) from exc
    if len(samples) < announced:
        raise AudioError(f"{file}: is cut off: {len(samples)} of {announced} samples; copy it again")
    return samples, rate


def _refuse_cut_wav(file: Path) -> None:
    """libsndfile reads a cut WAV without a word, so its header is compared with the file's size here."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        while len(chunk := f.read(8)) == 8:
            kind, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if kind == b"data":
                if length not in _UNKNOWN_SIZES and f.tell() + length > size:
                    raise AudioError(
                        f"{file}: is cut off: its header announces {length} bytes of sound, "
                        f"{size - f.tell()} are there; copy it again"
                    )
                return
            f.seek(length + length % 2, os.SEEK_CUR)
    raise AudioError(f"{file}: is cut off before its sound begins; copy it again")


def _to_mono(name: str, samples: F32, channel: int | None) -> F32:
    channels = samples.shape[1]
    if channel is not None:
        if not 0 <= channel < channels:
            raise AudioError(f"{name}: has {channels} channel(s), so there is no channel {channel}")
        return samples[:, channel]
    if channels > MAX_CHANNELS:
        raise AudioError(
            f"{name}: has {channels} channels, and mixing them would blur the speech; "
            "pick the one with the speaker: --channel N (from 0)"
        )
    return samples[:, 0] if channels == 1 else np.asarray(samples.mean(1), np.float32)


def feature_count(samples: int, spec: FrontEndSpec) -> int:
    """Encoder features of `samples` samples: int(ms / 20) + 1, as the published model counts them."""
    return int(samples / spec.sample_rate * 1000 / 20) + 1


def log_mel(samples: F32, spec: FrontEndSpec, frames: int) -> F32:
    """Whisper's log-mel (arXiv 2212.04356, section 2.2) of samples zero-padded to `frames` frames: [n_mels, frames].

    log10 of the mel power, floored 8 below its maximum, (x + 4) / 4. Frames that see only padding are filled
    instead of computed.
    """
    if len(samples) > frames * spec.hop:
        raise AudioError(f"{len(samples)} samples do not fit a window of {frames} mel frames")
    half = spec.n_fft // 2
    busy = min(frames, -(-(len(samples) + half) // spec.hop) + 1)
    padded = np.zeros(busy * spec.hop + spec.n_fft, np.float32)
    padded[half : half + len(samples)] = samples
    padded[:half] = samples[1 : half + 1][::-1] if len(samples) > half else _reflect(padded, half)
    if frames * spec.hop - len(samples) < half:  # a full window: its right edge is mirrored as well
        edge = half + frames * spec.hop
        padded = np.concatenate([padded[:edge], padded[edge - half - 1 : edge - 1][::-1]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, spec.n_fft)[:: spec.hop][:busy]
    power = np.abs(np.fft.rfft(windows * _hann(spec.n_fft), axis=1)) ** 2
    mel = np.log10(np.maximum(_mel_bands(power, spec), _MEL_FLOOR))
    out = np.full((spec.n_mels, frames), np.log10(_MEL_FLOOR), np.float32)
    out[:, :busy] = mel
    np.maximum(out, out.max() - _MEL_RANGE, out=out)
    return np.asarray((out + 4) / 4, np.float32)


def _reflect(padded: F32, half: int) -> F32:
    return padded[half + 1 : 2 * half + 1][::-1].copy()


@lru_cache
def _hann(n: int) -> F32:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)).astype(np.float32)


def _mel_bands(power: F32, spec: FrontEndSpec) -> F32:
    """Power [frames, bins] -> mel bands [n_mels, frames], band by band over the few bins that each covers.

    No matrix product: numpy's would wake BLAS threads, which then spin beside the engine's (10 % of the time to
    first audio on two cores).
    """
    return np.stack([(power[:, b] * w).sum(1) for b, w in _mel_supports(spec)])


@lru_cache
def _mel_supports(spec: FrontEndSpec) -> list[tuple[slice, F32]]:
    """Of each filter the bins where it is not zero, and its weights there."""
    out = []
    for row in _mel_filters(spec):
        used = np.flatnonzero(row)
        bins = slice(used[0], used[-1] + 1) if len(used) else slice(0, 0)
        out.append((bins, row[bins]))
    return out


def _mel_filters(spec: FrontEndSpec) -> F32:
    """Triangular filters on Slaney's mel scale, each of unit area (what librosa calls norm='slaney')."""
    top = _hz_to_mel(np.array(spec.sample_rate / 2))
    edges = _mel_to_hz(np.linspace(0, top, spec.n_mels + 2))
    bins = np.fft.rfftfreq(spec.n_fft, 1 / spec.sample_rate)
    width = np.diff(edges)
    ramps = edges[:, None] - bins[None]
    rising, falling = -ramps[:-2] / width[:-1, None], ramps[2:] / width[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling))
    return (weights * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


_LINEAR_HZ, _BREAK_HZ, _LOG_STEP = 200 / 3, 1000.0, np.log(6.4) / 27


def _hz_to_mel(hz: F64) -> F64:
    log = _BREAK_HZ / _LINEAR_HZ + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz >= _BREAK_HZ, log, hz / _LINEAR_HZ)


def _mel_to_hz(mel: F64) -> F64:
    start = _BREAK_HZ / _LINEAR_HZ
    return np.where(mel >= start, _BREAK_HZ * np.exp(_LOG_STEP * (mel - start)), _LINEAR_HZ * mel)


def to_pcm16(samples: F32) -> NDArray[np.int16]:
    """Float samples -> 16-bit PCM, clipped rather than wrapped."""
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)
