"""The generation loop: one for all tasks and all engines.

Prefill, then frame by frame: body, heads, sampling, text out, codec frames out along the delay pattern. Stopping
rules are those of the published model (gpt-omni/mini-omni, litgpt/generate/base.py): the prefill's ids are never
tested; the last audio stream's eoa ends an answer with audio and is not emitted; the text's eot is emitted, and from
the next frame on text is pad_t; in tasks without audio eot ends the answer and is not emitted.

Where Options.overlap says so, the codec computes beside the LLM (overlap.py).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .arrays import F32, I32, I64
from .components import Components, Features
from .errors import EdgeOmniError, PromptError, UsageError
from .interrupt import Interrupt, Interrupted
from .overlap import BusyClock, Overlap, Player, SharedThreads
from .prefill import prefill
from .prompts import Prompt
from .sampling import Sampler, Sampling, check_seed
from .spans import Spans
from .spec import AUDIO_OUT, OmniSpec, TokenLayout
from .streaming import AudioStream
from .tokens import audio_constant, delay, shift_audio

StopReason = Literal["eoa", "eot", "length", "cancelled"]


@dataclass(frozen=True)
class Forced:
    """What a benchmark forces on the answer: its codec frames [n, K], and the LLM frame at which text ends."""

    codec_frames: I64 | None = None
    text_end: int | None = None


@dataclass(frozen=True)
class Options:
    """`max_length` counts frames, prompt included (the published max_returned_tokens).

    `stop_ids`: text ids beside eot that end the text; the answer holds eot in their place.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_length: int | None = None
    strict: bool = False
    noise_seed: int | None = None
    forced: Forced = field(default_factory=Forced)
    stop_ids: frozenset[int] = frozenset()
    overlap: Overlap = Overlap()


@dataclass(frozen=True)
class Frame:
    """One LLM step: unshifted audio ids [K] (pad_a in tasks without audio) and the text id."""

    audio: I64
    text: int


@dataclass(frozen=True)
class Samples:
    """Audio that became final, [S]."""

    samples: F32


@dataclass(frozen=True)
class Stop:
    reason: StopReason
    silent_frames: int
    busy_s: float
    """Seconds in which LLM or codec computed after prefill: the consumer's time counts only while a push runs in it."""


def generate(
    components: Components,
    spec: OmniSpec,
    task: str,
    prompt: Prompt,
    features: Sequence[Features],
    options: Options,
    spans: Spans,
    interrupt: Interrupt | None = None,
) -> Generator[Frame | Samples | Stop, None, None]:
    """Runs one turn; yields each Frame, Samples as the codec finishes them, and one Stop.

    Samples come after the Frame that completes their chunk: right after it, or where the codec computes beside the LLM
    (`options.overlap`) after one of those that follow, at the latest the one that completes the next chunk. They are
    the same in both, chunk by chunk. An error is raised when everything before it was handed out. When a turn is
    cancelled, the sound that is not handed out yet is dropped. Closing the generator waits for a push under way.

    Once `interrupt` is set, the turn stops before its next frame, or in the middle of its prefill. Raises PromptError
    where the prompt leaves no room for an answer, and UsageError for lengths that make no sense.
    """
    check_lengths(spec, options)
    room = _room(spec, prompt, options)
    turn = _Turn(components, spec, task, prompt, options, spans)
    interrupt = interrupt or Interrupt()
    try:
        hidden = turn.prefill(features, prompt.length + room, interrupt)
    except Interrupted:
        yield Stop("cancelled", 0, 0.0)
        return
    yield from turn.frames(hidden, room, interrupt)


def next_ids(layout: TokenLayout, audio: I64, text: int, rows: int) -> I32:
    """Input ids int32 [rows, K+1, 1] of the frame after one that chose `audio` [K] (unshifted) and `text`.

    Row 0 is fed its own audio. Row 1 answers in text only and is fed pad_a; both are fed the same text id.
    """
    spoken = np.append(shift_audio(layout, audio), text)
    silent = np.append(audio_constant(layout, layout.pad_a)[:, 0], text)
    return np.stack([spoken, silent][:rows]).astype(np.int32)[:, :, None]


def check_lengths(spec: OmniSpec, options: Options) -> None:
    """Raises UsageError for a length of 0 or less, and for forced codec frames that are no [n, K] array."""
    end, codes = options.forced.text_end, options.forced.codec_frames
    for name, length in (("max_length", options.max_length), ("forced text_end", end)):
        whole = isinstance(length, (int, np.integer)) and not isinstance(length, bool)
        if length is not None and (not whole or length < 1):
            raise UsageError(f"{name} must be a whole number of frames above 0, not {length!r}")
    streams = spec.layout.streams
    if codes is not None and (codes.ndim != 2 or codes.shape[1] != streams or not len(codes)):
        raise UsageError(f"forced codec frames must be ids of shape [frames, {streams}], not {codes.shape}")
    if options.noise_seed is not None:
        check_seed(options.noise_seed, "noise_seed")


def _room(spec: OmniSpec, prompt: Prompt, options: Options) -> int:
    limit = min(options.max_length or spec.context, spec.context)
    if prompt.length >= limit:
        raise PromptError(
            f"the prompt takes {prompt.length} frames, and {limit} are allowed in all (context {spec.context}): "
            "shorten the question or raise --max-length"
        )
    return limit - prompt.length


class _Turn:
    """The state of one answer."""

    def __init__(
        self, components: Components, spec: OmniSpec, task: str, prompt: Prompt, options: Options, spans: Spans
    ) -> None:
        self.llm, self.layout, self.prompt, self.spans = components.llm, spec.layout, prompt, spans
        self.speaks = task in AUDIO_OUT
        self.options, self.sampler = options, Sampler(options.sampling)
        self.text_row = prompt.rows - 1
        self.text_ended = False
        self.seen: list[int] = []
        self.pad_audio = np.full(spec.layout.streams, spec.layout.pad_a, np.int64)
        self.player: Player | None = None
        if self.speaks:
            audio = AudioStream(
                components.codec, spec.codec, spans, strict=options.strict, noise_seed=options.noise_seed
            )
            self.player = Player(audio, SharedThreads(components, options.overlap.threads), spans)
        self.recent: list[I64] = []
        self.forced = self._forced_streams()
        self.state: Any = None

    def _forced_streams(self) -> I64 | None:
        codes = self.options.forced.codec_frames
        if codes is None:
            return None
        streams = delay(codes, self.layout.pad_a, len(codes) + self.layout.streams + 1)
        streams[-1, -1] = self.layout.eoa
        return streams

    def prefill(self, features: Sequence[Features], frames: int, interrupt: Interrupt) -> Any:
        """The hidden of the prompt's last position. Raises Interrupted."""
        with self.spans("prefill"):
            self.state = self.llm.start(self.prompt.rows, frames)
            return prefill(self.llm, self.prompt.ids, features, self.state, interrupt)

    def frames(self, hidden: Any, room: int, interrupt: Interrupt) -> Iterator[Frame | Samples | Stop]:
        reason: StopReason = "length"
        frame: Frame | None = None
        clock = BusyClock(self.player)
        try:
            for index in range(room):
                if interrupt.is_set():
                    reason = "cancelled"
                    break
                with self.spans("frame"):
                    if frame is not None:
                        hidden = self._step(frame)
                    frame = self._choose(hidden, index)
                if index and (stop := self._stops(frame)):
                    reason = stop
                    break
                self._note(frame, index)
                chunks = self._codec_frame(frame)
                with clock.stopped():
                    yield frame
                yield from self._samples(chunks, clock)
            yield from self._samples(self._rest(reason), clock)
            with clock.stopped():
                yield Stop(reason, self.player.silent_frames if self.player else 0, clock.busy)
        except EdgeOmniError:
            if self.player and not interrupt.is_set():
                yield from self._samples(self.player.wait(), clock)
            raise
        finally:
            if self.player:
                self.player.close()

    def _samples(self, chunks: Iterable[F32], clock: BusyClock) -> Iterator[Samples]:
        for samples in chunks:
            if len(samples):
                with clock.stopped():
                    yield Samples(samples)

    def _step(self, frame: Frame) -> Any:
        if self.text_row and self.text_ended:
            self.llm.drop(self.state, self.text_row)
            self.text_row = 0
        if self.player:
            self.player.share_threads()
        ids = next_ids(self.layout, frame.audio, frame.text, rows=self.text_row + 1)
        with self.spans("frame.body"):
            return self.llm.forward(ids, (), self.state)

    def _choose(self, hidden: Any, index: int) -> Frame:
        """The text id first, since some heads choose the audio ids by it."""
        audio, text = self.pad_audio, self.layout.pad_t
        draws = self.sampler.draws(self.layout.streams) if self.speaks else None
        if not self.text_ended:
            with self.spans("frame.text_head"):
                logits = self.llm.text_logits(hidden, self.text_row)
            with self.spans("frame.sampling"):
                text = self.sampler.text(logits, self.seen)
            if text in self.options.stop_ids:
                text = self.layout.eot
        if draws is not None:
            with self.spans("frame.audio_head"):
                audio = self.llm.frame_ids(hidden, 0, text, draws, self.options.sampling)
        return self._force(audio, text, index)

    def _force(self, audio: I64, text: int, index: int) -> Frame:
        if self.forced is not None:
            audio = self.forced[:, min(index, self.forced.shape[1] - 1)]
        end = self.options.forced.text_end
        if end is not None and not self.text_ended:
            text = self.layout.eot if index >= end else (0 if text == self.layout.eot else text)
        return Frame(audio, text)

    def _stops(self, frame: Frame) -> StopReason | None:
        if self.speaks:
            return "eoa" if frame.audio[-1] == self.layout.eoa else None
        return "eot" if frame.text == self.layout.eot else None

    def _note(self, frame: Frame, index: int) -> None:
        if self.speaks and index and frame.text == self.layout.eot:
            self.text_ended = True
        if not self.text_ended:
            self.seen.append(frame.text)

    def _codec_frame(self, frame: Frame) -> Sequence[F32]:
        """The codec frame that this LLM frame completes lies on the diagonal of the last K frames."""
        if self.player is None:
            return ()
        self.recent.append(frame.audio)
        k = self.layout.streams
        if len(self.recent) <= k:
            return ()
        self.recent = self.recent[-k:]
        diagonal = np.array([self.recent[i][i] for i in range(k)], np.int64)
        return self.player.add(diagonal, beside=self.options.overlap.beside(self.text_row + 1))

    def _rest(self, reason: StopReason) -> Iterable[F32]:
        """What is still to be said; nothing of a cancelled answer, though what its codec is at is waited for."""
        if self.player is None:
            return ()
        if reason == "cancelled":
            self.player.wait()
            return ()
        return self.player.finish()
