"""One question answered as a user would see it: the words as they come, the sound into a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import F32
from ..printing import say
from ..sampling import Sampling
from ..session import AudioChunk, Session, TextDelta, Turn, TurnEnd
from ..sound_writer import SoundWriter
from ..spec import OmniSpec

if TYPE_CHECKING:
    from rich.console import Console

MAX_SECONDS = 4.0
"""Sound of an answer at most. nano's longest, counting to eight, lasts two and a half seconds."""
_ANSWER_FRAMES = 60
"""LLM frames that a transcript or an answer may have at least: several times what nano's longest need."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What was heard and answered in words; the answer's samples float32 [S] at `rate` Hz; the end of its turn."""

    heard: str
    text: str
    samples: F32
    rate: int
    end: TurnEnd

    @property
    def first_audio_s(self) -> float | None:
        """From the end of the question to the first sound, in seconds; None where nothing was said."""
        return self.end.timings.get("ttfa")


def longest(spec: OmniSpec) -> int:
    """LLM frames of a turn at most, prompt included: a model that does not end would fill its whole context."""
    return min(spec.context, spec.encoder.context + _ANSWER_FRAMES)


def answered(console: Console, session: Session, question: F32, wav: Path) -> Answer:
    """Transcribes and answers samples float32 [S] at the front end's rate, greedily; the sound goes to the new `wav`.

    Raises AudioError for a question that the model cannot take, such as one longer than its encoder's window.
    """
    rate = session.spec.codec.sample_rate
    how: dict[str, Any] = {"sampling": Sampling(greedy=True), "max_length": longest(session.spec)}
    console.print("it hears:   ", end="")
    heard, _ = _followed(console, session.respond("asr", question, **how))
    console.print("it answers: ", end="")
    answer, samples = _followed(console, session.respond("aa", question, **how, max_seconds=MAX_SECONDS))
    with SoundWriter(wav, rate) as out:
        out.write(samples)
    return Answer(heard.text.strip(), answer.text.strip(), samples, rate, answer)


def summary(answer: Answer) -> str:
    """How long the answer is and how fast it came, in one line."""
    times = answer.end.timings
    if answer.first_audio_s is None:
        return "no sound came"
    cut = ", cut off there" if answer.end.reason == "length" else ""
    return (
        f"{times['audio']:.1f} s of sound{cut}; first audio {1000 * answer.first_audio_s:.0f} ms after the question, "
        f"RTF {times['rtf']:.3f}"
    )


def _followed(console: Console, turn: Turn) -> tuple[TurnEnd, F32]:
    """Prints the words of a turn as they come; its end, and its sound [S]."""
    chunks = [np.zeros(0, np.float32)]
    for event in turn:
        if isinstance(event, TextDelta):
            console.print(event.text, end="", style="cyan", soft_wrap=True)
        elif isinstance(event, AudioChunk):
            chunks.append(event.samples)
        else:
            end = event
    say(console)
    return end, np.concatenate(chunks)
