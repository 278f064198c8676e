"""One turn: the events of an answer, the iterator that hands them out, and the measurement of its times."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from inspect import GEN_CLOSED, getgeneratorstate
from time import perf_counter
from types import TracebackType

import numpy as np

from .arrays import F32, I32
from .components import Components, Features
from .errors import EdgeOmniError, UsageError
from .generate import Frame, Options, Samples, Stop, StopReason, generate
from .interrupt import Interrupt, Interrupted
from .prompts import Prompt
from .question import Question
from .spans import Spans
from .spec import AUDIO_OUT, OmniSpec, Task
from .text import TextStream, Tokenizer

logger = logging.getLogger("edgeomni")

_SHOWN_TEXT = 40


@dataclass(frozen=True)
class TextDelta:
    """Text that became final since the last one."""

    text: str


@dataclass(frozen=True, eq=False, repr=False)
class AudioChunk:
    """`samples` float32 [S] in [-1, 1] at `sample_rate` Hz; `start_s` is their place in the answer, in seconds.

    Chunks are equal where all three are; the samples are compared one by one.
    """

    samples: F32
    sample_rate: int
    start_s: float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AudioChunk):
            return NotImplemented
        same = (self.sample_rate, self.start_s) == (other.sample_rate, other.start_s)
        return same and np.array_equal(self.samples, other.samples)

    def __hash__(self) -> int:
        return hash((len(self.samples), self.sample_rate, self.start_s))

    def __repr__(self) -> str:
        return f"AudioChunk({len(self.samples)} samples, {self.sample_rate} Hz, at {self.start_s:.3f} s)"


@dataclass(frozen=True, eq=False, repr=False)
class TurnEnd:
    """The end of a turn.

    `reason`: "eoa" or "eot" where the model ended its audio or its text, "length" where a limit did, "cancelled".
    `tokens` int32 [K+1, frames]: audio streams first, then text, unshifted (text only tasks: audio rows hold pad_a).
    `silent_frames`: codec frames that held ids that are no codec entries, and so became silence.
    `timings` in seconds, from the call of respond: prefill (its end), ttft (first text), ttfa (first audio), total;
    audio (the answer's duration); rtf (time in the loop after prefill over that duration, the listener's own time
    left out), rtf_turn (total over that duration), frames, frames_per_s. What did not happen is left out.
    `spans`: the durations of each stage. Two ends are equal only where they are the same object.
    """

    reason: StopReason
    text: str
    tokens: I32
    silent_frames: int
    timings: dict[str, float]
    spans: Spans

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN_TEXT else f"{self.text[:_SHOWN_TEXT]}…"
        times = f"{self.timings.get('audio', 0):.2f} s of audio in {self.timings.get('total', 0):.2f} s"
        return f"TurnEnd({self.reason}, {self.tokens.shape[-1]} frames, {times}, text {text!r})"


Event = TextDelta | AudioChunk | TurnEnd


class Turn(Iterator[Event]):
    """An answer under way: iterate over its events. The session is free again when the last one was taken.

    Whoever does not want the rest calls `close`, leaves the `with` block, or just lets go of the object. To stop an
    answer from another thread, or to get its TurnEnd, use Session.cancel.
    """

    def __init__(self, events: Generator[Event, None, None], interrupt: Interrupt) -> None:
        self._events, self._interrupt = events, interrupt

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def finished(self) -> bool:
        """Whether the last event was taken, an error ended the turn, or it was closed."""
        return getgeneratorstate(self._events) == GEN_CLOSED

    def cancel(self) -> None:
        """What Session.cancel does."""
        self._interrupt.set()

    def close(self) -> None:
        """Drops the rest of the answer and frees the session. Not for other threads than the one that iterates."""
        self._events.close()

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Model:
    """What a session answers with. A turn under way holds on to it, also where its session is closed meanwhile."""

    components: Components
    spec: OmniSpec
    tokenizer: Tokenizer


class Answer:
    """Computes one answer and measures it.

    `audio_frames`: codec frames that the answer has at most (None: no limit). `began`: the perf_counter at which
    the question was asked.
    """

    def __init__(
        self,
        model: Model,
        question: Question,
        options: Options,
        audio_frames: int | None,
        interrupt: Interrupt,
        began: float,
    ) -> None:
        self._model, self._spec = model, model.spec
        self._question, self._options, self._audio_frames = question, options, audio_frames
        self._interrupt, self._began = interrupt, began
        self._spans, self._timings = Spans(), dict[str, float]()
        self._text = TextStream(model.tokenizer)
        self._frames: list[Frame] = []
        self._samples = 0

    def events(self) -> Generator[Event, None, None]:
        """TextDelta and AudioChunk as they come, then one TurnEnd, also where the turn is interrupted."""
        try:
            features = self._question.features(self._spec, self._model.components.encoder, self._spans, self._interrupt)
            count = 0 if features is None else len(features)
            prompt = self._question.prompt(self._spec, self._model.tokenizer, count)
            yield from self._answer(prompt, features)
        except (Interrupted, EdgeOmniError) as exc:
            if not self._interrupt.is_set():
                raise
            if not isinstance(exc, Interrupted):
                logger.info("while the turn was being cancelled: %s", exc)
            yield from self._end(Stop("cancelled", 0, 0.0))

    def _answer(self, prompt: Prompt, features: F32 | None) -> Iterator[Event]:
        task, options = self._question.task, self._bounded(prompt)
        segments = () if features is None else (Features(prompt.feature_start, features),)
        events = generate(
            self._model.components, self._spec, task, prompt, segments, options, self._spans, self._interrupt
        )
        with closing(events):
            for event in events:
                if isinstance(event, Frame):
                    yield from self._frame(event)
                elif isinstance(event, Samples):
                    yield self._chunk(event.samples)
                else:
                    yield from self._end(event)

    def _bounded(self, prompt: Prompt) -> Options:
        """Options whose max_length, which counts LLM frames and the prompt, also keeps to `audio_frames`.

        The delay pattern completes the first codec frame with LLM frame K+1, so n codec frames take n + K.
        """
        if self._audio_frames is None:
            return self._options
        most = prompt.length + self._audio_frames + self._spec.layout.streams
        return replace(self._options, max_length=min(self._options.max_length or most, most))

    def _mark(self, name: str) -> None:
        """Notes the time since the question under that name, the first time that it is called with it."""
        self._timings.setdefault(name, perf_counter() - self._began)

    def _frame(self, frame: Frame) -> Iterator[TextDelta]:
        self._mark("prefill")
        self._frames.append(frame)
        if delta := self._text.add(frame.text):
            self._mark("ttft")
            yield TextDelta(delta)

    def _chunk(self, samples: F32) -> AudioChunk:
        self._mark("ttfa")
        rate = self._spec.codec.sample_rate
        start, self._samples = self._samples, self._samples + len(samples)
        return AudioChunk(samples, rate, start / rate)

    def _end(self, stop: Stop) -> Iterator[TextDelta | TurnEnd]:
        if rest := self._text.finish():
            self._mark("ttft")
            yield TextDelta(rest)
        if stop.silent_frames:
            logger.warning(
                "%d codec frame(s) held ids that are no codec entries and became silence", stop.silent_frames
            )
        timings = self._measured(stop.busy_s)
        yield TurnEnd(stop.reason, self._text.text, self._tokens(), stop.silent_frames, timings, self._spans)

    def _tokens(self) -> I32:
        rows = [[*f.audio, f.text] for f in self._frames]
        return np.array(rows, np.int32).reshape(-1, self._spec.layout.streams + 1).T.copy()

    def _measured(self, busy_s: float) -> dict[str, float]:
        """All timings of the turn. `busy_s`: time in the loop after prefill, without the listener's."""
        self._mark("total")
        duration = self._samples / self._spec.codec.sample_rate
        timings = {**self._timings, "audio": duration, "frames": float(len(self._frames))}
        if busy_s > 0:
            timings["frames_per_s"] = len(self._frames) / busy_s
        if duration:
            timings["rtf"], timings["rtf_turn"] = busy_s / duration, timings["total"] / duration
        return timings


def audio_frames(task: Task, max_seconds: float | None, spec: OmniSpec) -> int | None:
    """Codec frames that fit into `max_seconds` of sound; None for None.

    Raises UsageError for a task without sound, and for a number that is not finite or shorter than one codec frame.
    """
    if max_seconds is None:
        return None
    if task not in AUDIO_OUT:
        raise UsageError(f"max_seconds bounds the sound of an answer, and task {task} answers in text; use max_length")
    frame_s = spec.codec.frame_samples / spec.codec.sample_rate
    number = isinstance(max_seconds, (int, float)) and not isinstance(max_seconds, bool)
    if not number or not frame_s <= max_seconds < float("inf"):
        raise UsageError(f"max_seconds must be a number from {frame_s:.3f} (one codec frame) up, not {max_seconds!r}")
    return int(max_seconds * spec.codec.sample_rate / spec.codec.frame_samples)
