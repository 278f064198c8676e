"""One sample of training or test data, and the recordings that it names. Nothing is decoded before it is asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile

from .. import audio as sound
from ..arrays import F32, I64
from ..errors import AudioError, DataError
from ..spec import AUDIO_IN, AUDIO_OUT, TASKS, Task


@dataclass(frozen=True)
class SoundInfo:
    """What a recording's header says. `seconds`: of the clip, where it is part of a longer recording."""

    sample_rate: int
    channels: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Clip:
    """A recording, or a part of one: a file, or the bytes of a sound file that `load` gives when they are wanted.

    `name` is what messages call it. `start_s` and `end_s` cut a part out (None: to its end).
    """

    source: Path | Callable[[], bytes]
    name: str
    start_s: float = 0.0
    end_s: float | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str], start_s: float = 0.0, end_s: float | None = None) -> Clip:
        """A clip of the sound file at `path`."""
        return cls(Path(path), os.fspath(path), start_s, end_s)

    def read(self, rate: int) -> F32:
        """Mono float32 samples [S] at `rate` Hz. Raises AudioError as edgeomni.audio.read does."""
        if isinstance(self.source, Path):
            whole = sound.read(self.source, rate)
        else:
            mono, source_rate = sound.decode(self.source(), self.name)
            whole = sound.as_samples(sound.resample(sound.as_samples(mono, self.name), source_rate, rate), self.name)
        if not self.start_s and self.end_s is None:
            return whole
        part = whole[round(self.start_s * rate) : None if self.end_s is None else round(self.end_s * rate)]
        return sound.as_samples(part, f"{self.name} from {self.start_s:g} s")

    def info(self) -> SoundInfo:
        """From the header alone where the format has one. Raises AudioError for what is no sound file."""
        try:
            header = soundfile.info(str(self.source) if isinstance(self.source, Path) else io.BytesIO(self.source()))
        except (soundfile.SoundFileError, OSError, ValueError, TypeError) as exc:
            raise AudioError(f"{self.name}: cannot be read as audio ({exc})") from exc
        end = header.duration if self.end_s is None else min(self.end_s, header.duration)
        return SoundInfo(header.samplerate, header.channels, max(0.0, end - self.start_s))


def check_fits(name: str, seconds: float, longest_s: float | None) -> None:
    """Raises AudioError for a question of `seconds` that is longer than the encoder's window of `longest_s`."""
    if longest_s is not None and seconds > longest_s:
        raise AudioError(
            f"{name}: lasts {seconds:.1f} s, and the encoder hears {longest_s:g} s at most; cut it into shorter "
            "recordings"
        )


class PreparedMel(Protocol):
    """Log-mels that were computed before (train/prepared.py), read when they are asked for."""

    @property
    def features(self) -> tuple[int, ...]:
        """Encoder features wanted of each recording."""
        ...

    def windows(self) -> list[F32]:
        """Of each recording the log-mel of its whole encoder window, float32 [n_mels, t]."""
        ...


@dataclass(frozen=True, eq=False)
class Sample:
    """One line of data. `where` ("train.jsonl:12") is what messages call it.

    `text`: what is said in `audio`, or the question in writing. `answer`: the answer's text; `answer_audio` the same
    spoken, `answer_codes` int64 [frames, K] the same as codec frames of the model's codec. `task` None: every task
    that the fields allow. `system` None: the checkpoint's own. `history`: earlier turns as (question, answer).
    `mel`: the log-mels of `audio`, in its place, where the data were prepared.
    """

    where: str
    task: Task | None = None
    audio: tuple[Clip, ...] = ()
    text: str = ""
    answer: str = ""
    answer_audio: Clip | None = None
    answer_codes: I64 | None = None
    system: str | None = None
    language: str = ""
    speaker: str = ""
    history: tuple[tuple[str, str], ...] = ()
    mel: PreparedMel | None = None

    def sound(self, rate: int, longest_s: float | None = None) -> F32:
        """The question as it is asked: its recordings one behind the other, samples [S] at `rate` Hz.

        Raises AudioError where one cannot be read, and where they last longer than `longest_s` (an encoder's window).
        """
        samples = np.concatenate([clip.read(rate) for clip in self.audio])
        check_fits(", ".join(clip.name for clip in self.audio), len(samples) / rate, longest_s)
        return samples

    def tasks(self) -> tuple[Task, ...]:
        """The sample's own task, or all that its fields allow. Raises DataError for a task whose fields are missing."""
        possible = tuple(task for task in TASKS if not self.missing(task))
        if self.task is None:
            return possible
        if missing := self.missing(self.task):
            raise DataError(f"{self.where}: task {self.task} needs {' and '.join(missing)}; add them, or leave it out")
        return (self.task,)

    def missing(self, task: Task) -> list[str]:
        """The fields that `task` needs and the sample lacks."""
        spoken = self.answer_audio is not None or self.answer_codes is not None
        has = {
            "audio": bool(self.audio) or self.mel is not None,
            "text": bool(self.text.strip()),
            "answer": bool(self.answer.strip()),
            "answer_audio": spoken,
        }
        needs = ["audio" if task in AUDIO_IN else "text", "text" if task == "asr" else "answer"]
        return [name for name in [*needs, *(["answer_audio"] if task in AUDIO_OUT else [])] if not has[name]]

    def answer_text(self, task: Task) -> str:
        """The text that the model is to write: the transcript for asr, the answer for the others."""
        return self.text if task == "asr" else self.answer
