"""Sound in: read, check, resample, log-mel. Samples are float32 in [-1, 1], mono."""

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
from .errors import AudioError, SilenceError
from .spec import FrontEndSpec

MAX_CHANNELS = 2
RATES_HZ = (4_000, 96_000)
"""Rates accepted: below is no speech, above is a mislabelled file far more often than a recording of speech."""
SILENCE_PEAK = 1e-4
"""Peak (-80 dBFS) under which a recording holds no speech."""
LOUDEST = 1e4
"""Largest sample accepted, 80 dB above full scale: beyond are unscaled integers or garbage, NaN in the log-mel."""
LONGEST_S = 3600
"""Longest recording read, in seconds: an hour of compressed silence takes a few kilobytes."""
_BLOCK = 1 << 20
_UNKNOWN_LENGTH = 1 << 62
"""From here on, libsndfile's count of samples means that the file states none."""
_DTYPE_REMEDIES = {
    "int16": "divide int16 by 32768 to get float32 samples between -1 and 1",
    "int32": "divide int32 by 2147483648 to get float32 samples between -1 and 1",
    "uint8": "subtract 128 and divide by 128 to get float32 samples between -1 and 1",
}
_MEL_FLOOR, _MEL_RANGE = 1e-10, 8.0
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
"""What streaming writers put in a WAV header when they cannot know the length."""


def read(path: str | os.PathLike[str], rate: int, channel: int | None = None) -> F32:
    """A sound file as mono float32 at `rate` Hz, [samples].

    Two channels are averaged; `channel` (from 0) picks one instead, of any number. Raises AudioError, each with its
    own message, for a file that is missing, empty, no audio, cut off, of zero length, silent, not finite, of more
    than two channels (without `channel`), of a rate outside `RATES_HZ`, or longer than `LONGEST_S`. Memory grows with
    the sound that the file holds, whatever its header announces.
    """
    file = Path(path)
    mono, source_rate = _decode(file, channel)
    name = str(path)
    return as_samples(resample(as_samples(mono, name), source_rate, rate), name)


def decode(data: bytes, name: str, channel: int | None = None) -> tuple[F32, int]:
    """The bytes of a sound file, as they come through a pipe: mono float32 [samples], and their rate in Hz.

    A pipe's header need not know the length, so a file that was cut off cannot always be told from one that was not.
    Raises AudioError for bytes that are no sound.
    """
    known = "WAV, FLAC, OGG and MP3 are understood, and raw PCM with --stdin-format s16le"
    return _opened(io.BytesIO(data), name, channel, known)


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


def as_samples(samples: object, name: str = "audio") -> F32:
    """A question's samples: array [S] of float16, float32 or float64 -> float32 [S].

    Raises AudioError that says what to do for other dtypes, other shapes, and samples that cannot be a question: none
    at all, NaN or infinite, beyond `LOUDEST`, silent (SilenceError). Full scale is 1; louder recordings are taken up
    to `LOUDEST`.
    """
    if not isinstance(samples, np.ndarray):
        raise AudioError(f"{name}: expected a NumPy array of samples, got {type(samples).__name__}")
    if samples.dtype.kind != "f" or samples.dtype.itemsize > 8:
        remedy = _DTYPE_REMEDIES.get(samples.dtype.name, "convert to float32 samples between -1 and 1")
        raise AudioError(f"{name}: samples are of dtype {samples.dtype.name}; {remedy}")
    if samples.ndim != 1:
        raise AudioError(
            f"{name}: expected mono samples of shape [S], got {samples.shape}; pick a channel (samples[:, 0] or "
            "samples[0]), or flatten a single one"
        )
    if not len(samples):
        raise AudioError(f"{name}: has zero length; record again")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: contains NaN or infinite samples; export it again from its source")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise AudioError(
            f"{name}: its peak is {peak:.3g}, and full scale is 1; samples beyond {LOUDEST:g} are no recording: "
            "divide integer samples by their full scale (int16 by 32768)"
        )
    if peak < np.float32(SILENCE_PEAK):  # as the samples have it: a peak of exactly 1e-4 in float32 is speech
        raise SilenceError(f"{name}: is silent (peak under {SILENCE_PEAK:g}); check the microphone")
    return np.ascontiguousarray(samples, np.float32)


def resample(samples: F32, source_rate: int, rate: int) -> F32:
    """Band-limited resampling (soxr, high quality)."""
    if source_rate == rate:
        return np.ascontiguousarray(samples, np.float32)
    return np.asarray(soxr.resample(samples, source_rate, rate), np.float32)


def _decode(file: Path, channel: int | None) -> tuple[F32, int]:
    """Mono samples at the file's own rate, and that rate."""
    if not file.is_file():
        raise AudioError(f"{file}: no such sound file")
    if file.stat().st_size == 0:
        raise AudioError(f"{file}: is empty (0 bytes); record or copy it again")
    if file.suffix.lower() == ".raw":
        raise AudioError(f"{file}: raw samples have no header that says what they are; convert the file to WAV first")
    _refuse_cut_wav(file)
    return _opened(file, str(file), channel, "WAV, FLAC, OGG and MP3 are understood")


def _opened(source: Path | io.BytesIO, name: str, channel: int | None, known: str) -> tuple[F32, int]:
    """Mono samples of what soundfile opens, and their rate."""
    try:
        with soundfile.SoundFile(source) as f:
            return _read_mono(f, name, channel), f.samplerate
    except soundfile.LibsndfileError as exc:
        reason = exc.error_string
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, OverflowError, MemoryError) as exc:
        reason = str(exc)
    raise AudioError(f"{name}: cannot be read as audio ({reason}); {known}")


def _read_mono(f: soundfile.SoundFile, name: str, channel: int | None) -> F32:
    """Reads block by block and keeps one channel, so that a header that announces too much costs no memory."""
    rate, announced = f.samplerate, f.frames
    _check_format(f, name, channel)
    blocks, count = [], 0
    size = max(1, _BLOCK // f.channels)
    while len(block := f.read(size, dtype="float32", always_2d=True)):
        blocks.append(_to_mono(block, channel))
        count += len(block)
        if count > LONGEST_S * rate:
            raise AudioError(f"{name}: lasts longer than {LONGEST_S} s; cut it into shorter recordings")
    if count < announced < _UNKNOWN_LENGTH:
        raise AudioError(f"{name}: is cut off: {count} of {announced} samples; copy it again")
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def _check_format(f: soundfile.SoundFile, name: str, channel: int | None) -> None:
    if channel is not None and not 0 <= channel < f.channels:
        raise AudioError(f"{name}: has {f.channels} channel(s), so there is no channel {channel}")
    if channel is None and f.channels > MAX_CHANNELS:
        raise AudioError(
            f"{name}: has {f.channels} channels, and mixing them would blur the speech; "
            "pick the one with the speaker: --channel N (from 0)"
        )
    check_rate(f.samplerate, name)


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


def _to_mono(samples: F32, channel: int | None) -> F32:
    """[S, channels] -> [S]: the channel, or the average of all. A copy, so that the block of all channels can go."""
    if channel is not None or samples.shape[1] == 1:
        return samples[:, channel or 0].copy()
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinite samples are refused later, by name
        return np.asarray(samples.mean(1), np.float32)


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
    busy = min(frames, mel_frames(len(samples), spec))
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


def mel_frames(samples: int, spec: FrontEndSpec) -> int:
    """Frames of a log-mel of `samples` samples from which on all others see only padding."""
    return -(-(samples + spec.n_fft // 2) // spec.hop) + 1


def pad_mel(mel: F32, frames: int) -> F32:
    """The first `mel_frames` of a log-mel [n_mels, t] -> all `frames` of its window [n_mels, frames], as `log_mel`
    fills them.
    """
    floor = max(np.log10(_MEL_FLOOR), float(mel.max()) * 4 - 4 - _MEL_RANGE)
    return np.pad(mel, ((0, 0), (0, frames - mel.shape[1])), constant_values=np.float32((floor + 4) / 4))


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
