"""Session: a loaded model that answers turns. What applications embed.

>>> with Session.open("bundle") as session:                             # doctest: +SKIP
...     for event in session.respond("aa", audio="question.wav"):
...         print(event)
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import get_args

from .arrays import I64
from .bundle import Bundle, is_bundle
from .components import Components
from .engines import Device, EngineChoice
from .errors import UsageError
from .generate import Forced, Options, check_lengths
from .hardware import check_threads, cores
from .interrupt import Interrupt
from .loaded import Ask, from_bundle, from_checkpoint
from .measured import Run
from .overlap import Overlap, OverlapChoice, OverlapMode, SharedThreads
from .question import LongAudio, Question, Sound, Window
from .sampling import Sampling
from .shipped import to_run
from .spec import OmniSpec, Task
from .text import Tokenizer
from .turn import Answer, AudioChunk, Event, Model, TextDelta, Turn, TurnEnd, audio_frames

__all__ = ["AudioChunk", "Event", "Session", "TextDelta", "Turn", "TurnEnd", "load"]

logger = logging.getLogger("edgeomni")


class Session:
    """Answers one question at a time on loaded components.

    Not for concurrent turns: open a Session per thread on one Bundle object. They share its weights, so that a
    further one costs only a KV cache.

    Who closes the components: those that `Session.open` loads are freed when the last session that uses them is
    closed or gone and, where a Bundle object was given, that object is gone too. Components that are given to the
    constructor belong to the caller, who closes them after the sessions.
    """

    def __init__(
        self, components: Components, spec: OmniSpec, tokenizer_json: str | None, overlap: Overlap | None = None
    ) -> None:
        self._hold(Model(components, spec, Tokenizer(tokenizer_json, spec.layout)), overlap or Overlap())

    def _hold(self, model: Model, overlap: Overlap) -> None:
        self.spec, self._overlap = model.spec, overlap
        if overlap.mode != "off":
            SharedThreads(model.components, overlap.threads).prepare()
        self.ways: dict[str, str] = {}
        """Component -> engine, device, format and precision that run it; empty for components given by the caller."""
        self.measured: Run | None = None
        """The profile of this machine by which these were chosen, if there is one."""
        self._stop_ids = frozenset(model.tokenizer.id_of(word) for word in model.spec.chat.stop_words)
        self._model: Model | None = model
        self._turn: weakref.ref[Turn] | None = None
        self._starting = threading.Lock()

    @classmethod
    def open(
        cls,
        source: Bundle | str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: Device | None = None,
        engine: EngineChoice = None,
        overlap: OverlapChoice = "auto",
        strict: bool = False,
    ) -> Session:
        """Opens a bundle (or a Bundle already open, whose weights are then shared) or a checkpoint directory.

        A checkpoint runs on the torch reference. The name of a shipped model ("nano") stands for its bundle, and with
        engine "torch" for its checkpoint; a local path of that name comes first. `threads`: per engine session, None
        for all cores. `engine`: one for all components, or one for each of some ({"encoder": "openvino"}); None and
        "auto" take the best that the bundle and this machine have, by this machine's profiles where there are any.
        What cannot be opened then gives way to what can, which is told as a warning; `strict` refuses that. `device`:
        None for what this machine has (torch stays on the CPU). `overlap`: whether the codec computes beside the LLM,
        which changes when sound comes and not how it sounds; "auto" times a bundle's answers once on this machine, on
        a CPU, and takes the fastest way (see `overlap`). Raises UsageError for names that do not exist and an engine
        that does not run this source, BundleError, CheckpointError (also for a stop word that is not one entry of the
        vocabulary), and EngineError for an engine or a device that is not there (EngineUnavailable: with the reason in
        one word).
        """
        if device is not None and device not in get_args(Device):
            raise UsageError(f"unknown device {device!r}; known are {', '.join(get_args(Device))}")
        if overlap not in get_args(OverlapChoice):
            raise UsageError(f"overlap must be {', '.join(get_args(OverlapChoice))}, not {overlap!r}")
        check_threads(threads)
        ask = Ask(threads, device, engine, overlap, strict)
        path = source if isinstance(source, Bundle) else to_run(source, engine if isinstance(engine, str) else None)
        if isinstance(path, Bundle) or is_bundle(path):
            loaded = from_bundle(path if isinstance(path, Bundle) else Bundle.open(path), ask)
        else:
            loaded = from_checkpoint(Path(path), ask)
        logger.info("threads: %s", threads or "all cores")
        logger.info("codec beside LLM: %s", loaded.overlap)
        session = cls.__new__(cls)
        session._hold(loaded.model, Overlap(loaded.overlap, threads or cores()))
        session.ways, session.measured = loaded.ways, loaded.measured
        return session

    @property
    def overlap(self) -> OverlapMode:
        """When the codec computes beside the LLM: "off", "on", or "after-text": only after the text of an answer.

        The sound is the same in all of them. A chunk that is decoded beside the LLM comes with one of the next frames.
        """
        return self._overlap.mode

    @property
    def model(self) -> Model:
        """Components, spec and tokenizer. Raises UsageError after `close`."""
        if self._model is None:
            raise UsageError("this Session is closed; open another one with Session.open")
        return self._model

    @property
    def components(self) -> Components:
        """What the session runs on. Raises UsageError after `close`."""
        return self.model.components

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back. Raises UsageError after `close`."""
        return self.model.tokenizer

    def cancel(self) -> None:
        """Ends the turn under way (barge-in): within one frame, in the middle of the encoder, or before it began.

        What comes next of the turn is its TurnEnd with reason "cancelled" (after the text that was held back, if any);
        then the session is free again. May be called from any thread and from a signal handler. Without a turn under
        way it does nothing.
        """
        if turn := self._answering():
            turn.cancel()

    def close(self) -> None:
        """Cancels a turn under way and lets go of the components (see the class for who frees them).

        A closed session answers nothing more; closing it again does nothing.
        """
        self.cancel()
        self._model = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def respond(
        self,
        task: Task,
        audio: Sound | None = None,
        text: str | None = None,
        *,
        sample_rate: int | None = None,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        max_seconds: float | None = None,
        two_row: bool = True,
        strict: bool = False,
        encoder_window: Window = None,
        long_audio: LongAudio = "refuse",
        channel: int | None = None,
        noise_seed: int | None = None,
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        forced_codes: I64 | None = None,
        forced_text_end: int | None = None,
    ) -> Turn:
        """Answers one question: an iterator over TextDelta and AudioChunk as they come, then one TurnEnd.

        The arguments are checked and the clock of the timings starts here, at the call; the work begins with the
        first event that is asked for. The session is busy until the last event was taken, the Turn is closed, or it
        is gone.

        `audio`: samples [S] float32 mono in [-1, 1], or the path of a sound file. `sample_rate` in Hz: of samples,
        which are resampled; without it they are at the front end's rate (16 kHz). `channel` (from 0): which channel
        of a file. `max_length`: LLM frames at most, prompt included. `max_seconds`: audio at most; no limit by
        default but the checkpoint's context. `encoder_window`: seconds, "auto" (as short as the audio), None for
        what the checkpoint was trained on. `long_audio` "split" encodes audio beyond the window piece by piece.
        `strict`: ids that are no codec entries raise EngineError instead of becoming silence. `noise_seed` switches
        the codec's noise on. `system`: the system prompt, None for the checkpoint's own, "" for none. `history`:
        earlier turns as (question, answer). `forced_codes` [frames, K] and `forced_text_end` are for benchmarks.

        Raises UsageError for a session that is answering already or closed and for arguments that do not go
        together, PromptError for what the checkpoint was not trained for, AudioError for audio that cannot be a
        question. A sound file is read with the first event, which can raise AudioError; a question too long for
        the context raises PromptError there.
        """
        began = perf_counter()
        model = self.model
        question = Question(
            task, audio, text, sample_rate, channel, encoder_window, long_audio, two_row, history, system
        )
        question.check(model.spec, model.tokenizer)
        frames = audio_frames(task, max_seconds, model.spec)
        forced = Forced(forced_codes, forced_text_end)
        options = Options(sampling or Sampling(), max_length, strict, noise_seed, forced, self._stop_ids, self._overlap)
        check_lengths(model.spec, options)
        interrupt = Interrupt()
        answer = Answer(model, question, options, frames, interrupt, began)
        return self._started(Turn(answer.events(), interrupt))

    def _started(self, turn: Turn) -> Turn:
        with self._starting:
            if self._answering():
                gc.collect()  # a turn that was dropped inside a reference cycle is garbage too, but not yet gone
            if self._answering():
                raise UsageError(
                    "this Session is answering already: take the rest of the answer or close it first, or open another "
                    "Session on the same Bundle, which shares the weights"
                )
            self._turn = weakref.ref(turn)
        return turn

    def _answering(self) -> Turn | None:
        """The turn under way. One that nobody holds any more is gone, whether it ever began or not."""
        turn = self._turn() if self._turn else None
        return turn if turn and not turn.finished else None


def load(
    source: Bundle | str | os.PathLike[str],
    *,
    threads: int | None = None,
    device: Device | None = None,
    engine: EngineChoice = None,
    overlap: OverlapChoice = "auto",
    strict: bool = False,
) -> Session:
    """A Session on a shipped model ("nano"), a bundle or a checkpoint: the same as `Session.open`, and raises the same.

    >>> with load("nano") as session:                                   # doctest: +SKIP
    ...     end = list(session.respond("at", audio="question.wav"))[-1]
    """
    return Session.open(source, threads=threads, device=device, engine=engine, overlap=overlap, strict=strict)
