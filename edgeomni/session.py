"""Session: a loaded model that answers turns. What applications embed.

>>> session = Session.open("bundle")                            # doctest: +SKIP
>>> for event in session.respond("aa", audio="question.wav"):   # doctest: +SKIP
...     print(event)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np

from . import audio as sound
from . import prompts
from .arrays import F32, I32, I64
from .bundle import Bundle, is_bundle
from .components import Components
from .errors import AudioError, CheckpointError, UsageError
from .generate import Forced, Frame, Options, Samples, Stop, StopReason, generate
from .sampling import Sampling
from .spans import Spans
from .spec import AUDIO_IN, OmniSpec
from .text import TextStream, Tokenizer

logger = logging.getLogger("edgeomni")

Window = Literal["auto"] | float | int | None
MIN_AUTO_WINDOW_S = 1


@dataclass(frozen=True)
class TextDelta:
    """Text that became final since the last one."""

    text: str


@dataclass(frozen=True)
class AudioChunk:
    """samples float32 [S] in [-1, 1]; `start_s` is their place in the answer."""

    samples: F32
    sample_rate: int
    start_s: float


@dataclass(frozen=True)
class TurnEnd:
    """The end of a turn.

    `tokens` int32 [K+1, frames]: audio streams first, then text, unshifted (text only tasks: audio rows hold pad_a).
    `timings` in seconds: ttft, ttfa (from the call of respond), prefill (its end), total, audio (duration);
    rtf (loop time after prefill over audio duration), rtf_turn (whole turn over audio duration), frames_per_s.
    """

    reason: StopReason
    text: str
    tokens: I32
    silent_frames: int
    timings: dict[str, float]
    spans: Spans


Event = TextDelta | AudioChunk | TurnEnd

_loaded: WeakKeyDictionary[Bundle, dict[tuple[object, ...], Components]] = WeakKeyDictionary()
_loading = threading.Lock()


class Session:
    """One conversation at a time on loaded components. Sessions of one Bundle object share its weights.

    Not for concurrent turns: open a Session per thread, which costs only a KV cache.
    """

    def __init__(self, components: Components, spec: OmniSpec, tokenizer_json: str | None) -> None:
        self.components, self.spec = components, spec
        self.tokenizer = Tokenizer(tokenizer_json, spec.layout)
        self._cancel = threading.Event()
        self._busy = threading.Lock()

    @classmethod
    def open(
        cls,
        source: Bundle | str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: str = "cpu",
        engine: str | None = None,
    ) -> Session:
        """Opens a bundle (or a Bundle already open, whose weights are then shared) or a checkpoint directory.

        A checkpoint runs on the torch reference. `engine` asserts which engine is meant ("onnxruntime", "torch").
        """
        if isinstance(source, Bundle) or is_bundle(source):
            bundle = source if isinstance(source, Bundle) else Bundle.open(source)
            return cls._of_bundle(bundle, threads, device, engine)
        return cls._of_checkpoint(Path(source), threads, device, engine)

    @classmethod
    def _of_bundle(cls, bundle: Bundle, threads: int | None, device: str, engine: str | None) -> Session:
        engines = sorted({c.engine for c in bundle.manifest.components.values()})
        if engine and engines != [engine]:
            raise UsageError(f"{bundle.path} runs on {', '.join(engines)}, not on {engine}; export for {engine} first")
        from . import runtimes

        with _loading:
            cache = _loaded.setdefault(bundle, {})
            if (key := (threads, device)) not in cache:
                cache[key] = runtimes.load(bundle, threads=threads, device=device)
        tokenizer = bundle.manifest.tokenizer
        text = bundle.file(tokenizer.path).read_text(encoding="utf-8") if tokenizer else None
        return cls(cache[key], bundle.spec, text)

    @classmethod
    def _of_checkpoint(cls, path: Path, threads: int | None, device: str, engine: str | None) -> Session:
        if engine not in (None, "torch"):
            raise UsageError(f"{path} is a checkpoint, which runs on torch; export it to run it on {engine}")
        if not path.exists():
            raise CheckpointError(f"{path}: no such bundle or checkpoint directory")
        from .model import checkpoints
        from .runtimes.torch import llm as torch_llm

        model = checkpoints.load(path)
        return cls(torch_llm.load(model, device=device, threads=threads), model.spec, model.tokenizer_json)

    def cancel(self) -> None:
        """Stops the running turn within one frame (barge-in). May be called from any thread."""
        self._cancel.set()

    def close(self) -> None:
        for part in (self.components.llm, self.components.codec):
            part.close()

    def respond(
        self,
        task: str,
        audio: F32 | str | os.PathLike[str] | None = None,
        text: str | None = None,
        *,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        two_row: bool = True,
        strict: bool = False,
        encoder_window: Window = None,
        long_audio: Literal["refuse", "split"] = "refuse",
        channel: int | None = None,
        noise_seed: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        forced_codes: I64 | None = None,
        forced_text_end: int | None = None,
    ) -> Iterator[Event]:
        """Answers one question; yields TextDelta and AudioChunk as they come, then one TurnEnd.

        `audio`: samples [S] float32 mono at the front end's rate, or a sound file. `encoder_window`: seconds, "auto"
        (as short as the audio), None for what the checkpoint was trained on. `long_audio` "split" encodes audio
        beyond the window piece by piece. `noise_seed` switches the codec's noise on. `forced_*` are for benchmarks.
        Raises AudioError, PromptError, UsageError.
        """
        if not self._busy.acquire(blocking=False):
            raise UsageError("this Session is answering already: open another one, which shares the weights")
        try:
            self._cancel.clear()
            forced = Forced(forced_codes, forced_text_end)
            options = Options(sampling or Sampling(), max_length, strict, noise_seed, forced)
            turn = _Answer(self, task, options)
            past = [(self.tokenizer.encode(q), self.tokenizer.encode(a)) for q, a in history]
            features, ids = turn.question(audio, text, encoder_window, long_audio, channel)
            count = 0 if features is None else len(features)
            prompt = prompts.build(self.spec, task, features=count, text_ids=ids, two_row=two_row, history=past)
            yield from turn.run(prompt, features, self._cancel.is_set)
        finally:
            self._busy.release()

    def encode(self, samples: F32, spans: Spans, window: Window, long_audio: str) -> F32:
        """Samples [S] -> features [F, D], F = int(ms / 20) + 1 as the published model counts."""
        front = self.spec.front_end
        samples = sound.as_samples(samples)
        limit = self._window_samples(len(samples), window)
        if len(samples) > limit and long_audio != "split":
            raise AudioError(
                f"the audio lasts {len(samples) / front.sample_rate:.1f} s, the encoder's window is "
                f"{limit / front.sample_rate:g} s; shorten it, or ask for it to be split (--long split)"
            )
        pieces = [samples[i : i + limit] for i in range(0, len(samples), limit)]
        return np.concatenate([self._encode_piece(p, limit, spans) for p in pieces])

    def _encode_piece(self, samples: F32, window: int, spans: Spans) -> F32:
        front = self.spec.front_end
        with spans("mel"):
            mel = sound.log_mel(samples, front, window // front.hop)
        with spans("encoder"):
            return self.components.encoder.encode(mel, sound.feature_count(len(samples), front))

    def _window_samples(self, samples: int, window: Window) -> int:
        front = self.spec.front_end
        full = front.window_s * front.sample_rate
        if window is None:
            window = front.window_s if self.spec.padded_window else "auto"
        if window == "auto":
            seconds = max(MIN_AUTO_WINDOW_S, -(-samples // front.sample_rate))
            return min(full, seconds * front.sample_rate)
        if not isinstance(window, (int, float)) or not 0 < window <= front.window_s:
            raise UsageError(f"encoder window must be auto or at most {front.window_s} s, not {window!r}")
        step = 2 * front.hop  # one feature is two mel frames
        return max(step, int(window * front.sample_rate) // step * step)


class _Answer:
    """Turns the loop's frames into events and keeps the turn's book."""

    def __init__(self, session: Session, task: str, options: Options) -> None:
        self.session, self.task, self.options = session, task, options
        self.spans, self.began = Spans(), perf_counter()
        self.text = TextStream(session.tokenizer)
        self.frames: list[Frame] = []
        self.samples = 0
        self.timings: dict[str, float] = {}

    def question(
        self,
        audio: F32 | str | os.PathLike[str] | None,
        text: str | None,
        window: Window,
        long_audio: str,
        channel: int | None,
    ) -> tuple[F32 | None, list[int]]:
        if self.task not in AUDIO_IN:
            return None, self.session.tokenizer.encode(text) if text else []
        if audio is None:
            return None, []
        if not isinstance(audio, np.ndarray):
            with self.spans("load"):
                audio = sound.read(audio, self.session.spec.front_end.sample_rate, channel)
        return self.session.encode(audio, self.spans, window, long_audio), []

    def run(self, prompt: prompts.Prompt, features: F32 | None, cancelled: Callable[[], bool]) -> Iterator[Event]:
        session = self.session
        events = generate(
            session.components, session.spec, self.task, prompt, features, self.options, self.spans, cancelled
        )
        with closing(events):
            for event in events:
                if isinstance(event, Frame):
                    yield from self._frame(event)
                elif isinstance(event, Samples):
                    yield self._chunk(event.samples)
                else:
                    yield from self._end(event)

    def _mark(self, name: str) -> None:
        self.timings.setdefault(name, perf_counter() - self.began)

    def _frame(self, frame: Frame) -> Iterator[TextDelta]:
        self._mark("prefill")
        self.frames.append(frame)
        if delta := self.text.add(frame.text):
            self._mark("ttft")
            yield TextDelta(delta)

    def _chunk(self, samples: F32) -> AudioChunk:
        self._mark("ttfa")
        rate = self.session.spec.codec.sample_rate
        start, self.samples = self.samples, self.samples + len(samples)
        return AudioChunk(samples, rate, start / rate)

    def _end(self, stop: Stop) -> Iterator[TextDelta | TurnEnd]:
        if rest := self.text.finish():
            self._mark("ttft")
            yield TextDelta(rest)
        if stop.silent_frames:
            logger.warning(
                "%d codec frame(s) held ids that are no codec entries and became silence", stop.silent_frames
            )
        yield TurnEnd(
            stop.reason, self.text.text, self._tokens(), stop.silent_frames, self._close_book(stop.busy_s), self.spans
        )

    def _tokens(self) -> I32:
        rows = [[*f.audio, f.text] for f in self.frames]
        return np.array(rows, np.int32).reshape(-1, self.session.spec.layout.streams + 1).T.copy()

    def _close_book(self, busy_s: float) -> dict[str, float]:
        self._mark("total")
        duration = self.samples / self.session.spec.codec.sample_rate
        book = {**self.timings, "audio": duration, "frames": float(len(self.frames))}
        if busy_s > 0:
            book["frames_per_s"] = len(self.frames) / busy_s
        if duration:
            book["rtf"], book["rtf_turn"] = busy_s / duration, book["total"] / duration
        return book
