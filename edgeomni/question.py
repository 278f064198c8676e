"""A question as it was asked: checked at once, turned into encoder features and a prompt when its turn begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from . import audio as sound
from . import prompts
from .arrays import F32
from .components import Encoder
from .errors import AudioError, UsageError
from .interrupt import Interrupt
from .spans import Spans
from .spec import AUDIO_IN, OmniSpec, Task
from .text import Tokenizer

Sound = F32 | str | os.PathLike[str]
"""Samples [S] float32 mono, or the path of a sound file."""
Window = Literal["auto"] | float | int | None
"""Seconds that the encoder hears at once; "auto": as short as the audio; None: what the checkpoint was trained on."""
LongAudio = Literal["refuse", "split"]
MIN_AUTO_WINDOW_S = 1


@dataclass(frozen=True, eq=False)
class Question:
    """What Session.respond was asked. `sample_rate`: of samples, None for the front end's own."""

    task: Task
    audio: Sound | None = None
    text: str | None = None
    sample_rate: int | None = None
    channel: int | None = None
    window: Window = None
    long_audio: LongAudio = "refuse"
    two_row: bool = True
    history: Sequence[tuple[str, str]] = ()
    system: str | None = None

    def check(self, spec: OmniSpec, tokenizer: Tokenizer) -> None:
        """Finds what is wrong with the question, as far as that shows without decoding a file or encoding sound.

        Raises UsageError for arguments that do not go together, PromptError for a task, text or history that the
        checkpoint does not take, AudioError for samples that cannot be a question and for a file that is not there.
        """
        if self.long_audio not in get_args(LongAudio):
            raise UsageError(f"long_audio must be refuse or split, not {self.long_audio!r}")
        _check_window(self.window, spec)
        self.prompt(spec, tokenizer, features=int(self.audio is not None))
        if self.task not in AUDIO_IN:
            self._refuse_sound()
        elif self.text is not None:
            raise UsageError(f"task {self.task} answers a spoken question, so leave text out; tt and ta take text")
        elif isinstance(self.audio, np.ndarray):
            self._check_samples(self.audio, spec)
        else:
            self._check_file(self.audio)

    def features(self, spec: OmniSpec, encoder: Encoder, spans: Spans, interrupt: Interrupt) -> F32 | None:
        """Encoder features [F, D], or None for a question in text.

        Raises AudioError for a file that cannot be a question, Interrupted where `interrupt` is set meanwhile.
        """
        interrupt.check()
        if self.audio is None:
            return None
        samples = self._samples(spec.front_end.sample_rate, spans)
        limit = window_samples(self.window, len(samples), spec)
        self._check_length(len(samples), limit, spec)
        starts = range(0, len(samples), limit)
        return np.concatenate([_encode(samples[i : i + limit], limit, spec, encoder, spans, interrupt) for i in starts])

    def prompt(self, spec: OmniSpec, tokenizer: Tokenizer, features: int) -> prompts.Prompt:
        """The prompt with room for `features` encoder features. Raises PromptError."""
        return prompts.from_texts(
            spec,
            tokenizer,
            self.task,
            features=features,
            text=self.text,
            system=self.system,
            two_row=self.two_row,
            history=self.history,
        )

    def _refuse_sound(self) -> None:
        if self.audio is not None:
            raise UsageError(f"task {self.task} answers a written question, so leave audio out; aa, at, asr take sound")
        if self.sample_rate is not None or self.channel is not None:
            raise UsageError(f"sample_rate and channel belong to sound, and task {self.task} takes text")

    def _check_samples(self, samples: F32, spec: OmniSpec) -> None:
        if self.channel is not None:
            raise UsageError("channel picks one of a sound file's channels; samples are mono, so leave it out")
        rate = spec.front_end.sample_rate if self.sample_rate is None else self.sample_rate
        sound.check_rate(rate, "audio")
        sound.as_samples(samples)
        heard = len(samples) * spec.front_end.sample_rate // rate
        self._check_length(heard, window_samples(self.window, heard, spec), spec)

    def _check_file(self, path: str | os.PathLike[str] | None) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"audio must be an array of samples or the path of a sound file, not {path!r:.60}")
        if self.sample_rate is not None:
            raise UsageError(
                f"sample_rate {self.sample_rate} was given with the file {os.fspath(path)}, but a sound file states "
                "its own rate; give sample_rate only with an array of samples"
            )
        if not Path(path).is_file():
            raise AudioError(f"{os.fspath(path)}: no such sound file")

    def _samples(self, rate: int, spans: Spans) -> F32:
        """The question's sound at the front end's `rate`, [S]."""
        assert self.audio is not None
        if not isinstance(self.audio, np.ndarray):
            with spans("load"):
                return sound.read(self.audio, rate, self.channel)
        samples = sound.as_samples(self.audio)
        if self.sample_rate in (None, rate):
            return samples
        with spans("load"):
            return sound.resample(samples, self.sample_rate, rate)

    def _check_length(self, samples: int, limit: int, spec: OmniSpec) -> None:
        rate = spec.front_end.sample_rate
        if samples > limit and self.long_audio != "split":
            raise AudioError(
                f"the audio lasts {samples / rate:.1f} s, the encoder's window is {limit / rate:g} s; shorten it, or "
                'ask for it to be encoded piece by piece (--long split; long_audio="split")'
            )


def _encode(samples: F32, window: int, spec: OmniSpec, encoder: Encoder, spans: Spans, interrupt: Interrupt) -> F32:
    """At most `window` samples [S] -> features [F, D], F = int(ms / 20) + 1 as the published model counts."""
    interrupt.check()
    with spans("mel"):
        mel = sound.log_mel(samples, spec.front_end, window // spec.front_end.hop)
    interrupt.check()
    with spans("encoder"):
        return encoder.encode(mel, sound.feature_count(len(samples), spec.front_end), interrupt)


def _check_window(window: Window, spec: OmniSpec) -> None:
    longest = spec.front_end.window_s
    if window is None or window == "auto":
        return
    if isinstance(window, bool) or not isinstance(window, (int, float)) or not 0 < window <= longest:
        raise UsageError(f"the encoder window must be auto or seconds up to {longest}, not {window!r}")


def window_samples(window: Window, samples: int, spec: OmniSpec) -> int:
    """Samples that the encoder hears at once, for audio of `samples` samples."""
    front = spec.front_end
    if window is None:
        window = front.window_s if spec.padded_window else "auto"
    if isinstance(window, str):
        seconds = max(MIN_AUTO_WINDOW_S, -(-samples // front.sample_rate))
        return min(front.window_s, seconds) * front.sample_rate
    step = 2 * front.hop  # one feature is two mel frames
    return max(step, int(window * front.sample_rate) // step * step)
