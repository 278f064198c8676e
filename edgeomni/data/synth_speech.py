"""Recordings of synthesized speech: silence at either end, gain and noise; made one after another or by processes."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile

from ..arrays import F32
from ..audio import to_pcm16
from ..errors import DataError
from . import espeak

Progress = Callable[[int, int], None]
"""Is told how many recordings of how many are made."""
_LOUDEST = 0.99
_OF_A_PROCESS = 4_000
"""Recordings that one process makes: espeak-ng keeps up to 0.1 MB of each (espeak.say), which ends with the process."""
_AT_ONCE = 16


@dataclass(frozen=True)
class Speech:
    """What is said, by which voice, and how it is recorded.

    `snr_db`: signal-to-noise ratio of pink noise in dB, None without noise; `seed` is the noise's. The other fields are
    those of `espeak.say`, of recipe.AnswerVoice and of recipe.Recording.
    """

    text: str
    voice: str
    rate_wpm: int
    pitch: int
    pitch_range: int
    before_s: float
    after_s: float
    gain_db: float = 0.0
    snr_db: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One recording to be made; the suffix of `path` says the format, `rate` is in Hz."""

    path: Path
    speech: Speech
    rate: int


def recording(speech: Speech, rate: int) -> F32:
    """The recording as samples [S] in [-1, 1] at `rate` Hz, the same for the same arguments.

    The noise lies over the silence too; its power is that of the voice, silence left out, less `snr_db`. Raises as
    `espeak.say` does.
    """
    voice = espeak.say(
        speech.text,
        speech.voice,
        rate_wpm=speech.rate_wpm,
        pitch=speech.pitch,
        pitch_range=speech.pitch_range,
        rate=rate,
    )
    samples = np.pad(voice, (round(speech.before_s * rate), round(speech.after_s * rate)))
    if speech.snr_db is not None:
        level = float(np.sqrt(np.mean(np.square(voice)))) * 10 ** (-speech.snr_db / 20)
        samples = samples + level * pink_noise(len(samples), speech.seed)
    gain = 10 ** (speech.gain_db / 20)
    return np.asarray(samples * min(gain, _LOUDEST / float(np.abs(samples).max())), np.float32)


def pink_noise(count: int, seed: int) -> F32:
    """Noise whose power falls with the frequency (by 3 dB per octave), of root mean square 1: samples [count]."""
    length = 1 << max(1, count - 1).bit_length()  # transforms of other lengths can take ten times as long
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(length))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, length)[:count]
    return np.asarray(noise / np.sqrt(np.mean(np.square(noise))), np.float32)


def recorded(jobs: Sequence[Job], workers: int) -> Iterator[int]:
    """Makes the recordings, and tells after some of them how many are made.

    Raises DataError for what cannot be spoken or written, and EngineError where espeak-ng is missing.
    """
    if workers == 1:
        for done, job in enumerate(jobs, 1):
            record(job)
            yield done
        return
    done = 0
    for start in range(0, len(jobs), workers * _OF_A_PROCESS):
        for _ in _by_processes(jobs[start : start + workers * _OF_A_PROCESS], workers):
            done += 1
            yield done


def _by_processes(jobs: Sequence[Job], workers: int) -> Iterator[None]:
    """Spawned processes, because a forked one would inherit threads and locks of this one."""
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"))
    try:
        with _interrupts_held():
            results = pool.map(record, jobs, chunksize=_AT_ONCE)
        yield from results
    except BrokenProcessPool as exc:
        raise DataError(f"a worker process ended before its work ({exc}); try fewer workers") from exc
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which reaches all of a terminal's; this one sees it after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def record(job: Job) -> None:
    """Makes one recording. Raises as `recording` does, and DataError for what the disk refuses."""
    samples = to_pcm16(recording(job.speech, job.rate))
    whole = io.BytesIO()  # written at once: soundfile would wait for the disk after every file
    soundfile.write(whole, samples, job.rate, subtype="PCM_16", format=job.path.suffix[1:].upper())
    try:
        job.path.write_bytes(whole.getvalue())
    except OSError as exc:
        raise DataError(f"{job.path.name}: cannot be written ({exc.strerror or exc}); is the disk full?") from exc
