"""Codec frames -> audio chunks: the first chunk as small as can be, then growing to save work.

Exactness is the codec decoder's business: it keeps every convolution's overlap between pushes, so the joined chunks
equal one offline decode whatever their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import F32, I64
from .components import CodecDecoder
from .errors import EngineError
from .spans import Spans
from .spec import CodecSpec
from .tokens import frames_to_codes

GROWTH = (1, 2, 4)
"""Sizes of the pushes after the first, in multiples of the codec's push; the last one repeats."""


@dataclass(frozen=True)
class Chunk:
    """What one push gives to the codec: `frames` int64 [n, K], and the numbers of those that become silence."""

    frames: I64
    silent: tuple[int, ...]
    last: bool


class AudioStream:
    """One answer's audio. Frames with ids that are no codec entries become silence, counted in `silent_frames`.

    `add` and `finish` do all there is to do. They are made of two halves that share nothing that changes, so that
    each may run in a thread of its own: `take` and `rest` collect frames into chunks, `push` decodes chunks, one
    after another and in their order.
    """

    def __init__(
        self,
        codec: CodecDecoder[Any],
        spec: CodecSpec,
        spans: Spans,
        *,
        strict: bool = False,
        noise_seed: int | None = None,
    ) -> None:
        self._codec, self._spec, self._spans, self._strict = codec, spec, spans, strict
        self._waiting: list[I64] = []
        self._silent: list[int] = []
        self._chunks = 0
        self._frames = 0
        self.silent_frames = 0
        self._state = codec.open(noise_seed)
        self._mute: list[int] = []
        self.samples = 0
        """Samples emitted so far."""

    def add(self, frame: I64) -> F32 | None:
        """Takes codec frame [K]; returns the samples that a full chunk made final, None while it fills."""
        chunk = self.take(frame)
        return None if chunk is None else self.push(chunk)

    def finish(self) -> F32:
        """The rest of the answer; empty where no frame was ever added."""
        chunk = self.rest()
        return np.zeros(0, np.float32) if chunk is None else self.push(chunk)

    def take(self, frame: I64) -> Chunk | None:
        """Takes codec frame [K]; returns the chunk that it fills. Raises EngineError in strict mode."""
        valid = (frame >= 0) & (frame < self._spec.codebook_size)
        if not valid.all():
            self._refuse_or_silence(frame)
            frame = np.where(valid, frame, 0)
        self._waiting.append(frame)
        self._frames += 1
        return self._chunk(last=False) if len(self._waiting) >= self._wanted else None

    def rest(self) -> Chunk | None:
        """The last chunk, which may hold no frames; None where no frame was ever taken."""
        return self._chunk(last=True) if self._frames else None

    def push(self, chunk: Chunk) -> F32:
        """Decodes a chunk; returns the samples that became final."""
        self._mute += chunk.silent
        with self._spans("codec"):
            samples = self._codec.decode(frames_to_codes(chunk.frames, self._spec), self._state, chunk.last)
        return self._silence(samples)

    @property
    def _wanted(self) -> int:
        multiple = self._codec.push_multiple
        if self._chunks == 0:
            return -(-self._codec.first_push // multiple) * multiple
        return GROWTH[min(self._chunks, len(GROWTH)) - 1] * multiple

    def _chunk(self, last: bool) -> Chunk:
        frames = np.stack(self._waiting) if self._waiting else np.zeros((0, self._spec.streams), np.int64)
        chunk = Chunk(frames, tuple(self._silent), last)
        self._waiting, self._silent = [], []
        self._chunks += 1
        return chunk

    def _refuse_or_silence(self, frame: I64) -> None:
        if self._strict:
            raise EngineError(
                f"codec frame {self._frames} holds ids {frame.tolist()}, not all below the codebook's "
                f"{self._spec.codebook_size}; without --strict it becomes silence"
            )
        self._silent.append(self._frames)
        self.silent_frames += 1

    def _silence(self, samples: F32) -> F32:
        start, hop = self.samples, self._spec.frame_samples
        self.samples += len(samples)
        for frame in reversed(self._mute):
            left, right = frame * hop - start, (frame + 1) * hop - start
            if right <= 0:
                break  # frames are in order: all earlier ones are already out
            samples[max(0, left) : max(0, right)] = 0
        return samples
