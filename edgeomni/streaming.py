"""Codec frames -> audio chunks: the first chunk as small as can be, then growing to save work.

Exactness is the codec decoder's business: it keeps every convolution's overlap between pushes, so the joined chunks
equal one offline decode whatever their sizes.
"""

from __future__ import annotations

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


class AudioStream:
    """One answer's audio. Frames with ids that are no codec entries become silence, counted in `silent_frames`."""

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
        self._state = codec.open(noise_seed)
        self._waiting: list[I64] = []
        self._pushes = 0
        self._frames = 0
        self._mute: list[int] = []
        self.samples = 0
        """Samples emitted so far."""

    @property
    def silent_frames(self) -> int:
        return len(self._mute)

    def add(self, frame: I64) -> F32 | None:
        """Takes codec frame [K]; returns the samples that a full chunk made final, None while it fills."""
        valid = (frame >= 0) & (frame < self._spec.codebook_size)
        if not valid.all():
            self._refuse_or_mute(frame)
            frame = np.where(valid, frame, 0)
        self._waiting.append(frame)
        self._frames += 1
        return self._push(last=False) if len(self._waiting) >= self._wanted else None

    def finish(self) -> F32:
        """The rest of the answer; empty where no frame was ever added."""
        if not self._frames:
            return np.zeros(0, np.float32)
        return self._push(last=True)

    @property
    def _wanted(self) -> int:
        multiple = self._codec.push_multiple
        if self._pushes == 0:
            return -(-self._codec.first_push // multiple) * multiple
        return GROWTH[min(self._pushes, len(GROWTH)) - 1] * multiple

    def _push(self, last: bool) -> F32:
        frames = np.stack(self._waiting) if self._waiting else np.zeros((0, self._spec.streams), np.int64)
        with self._spans("codec"):
            samples = self._codec.decode(frames_to_codes(frames, self._spec), self._state, last)
        self._waiting = []
        self._pushes += 1
        return self._silence(samples)

    def _refuse_or_mute(self, frame: I64) -> None:
        if self._strict:
            raise EngineError(
                f"codec frame {self._frames} holds ids {frame.tolist()}, not all below the codebook's "
                f"{self._spec.codebook_size}; without --strict it becomes silence"
            )
        self._mute.append(self._frames)

    def _silence(self, samples: F32) -> F32:
        start, hop = self.samples, self._spec.frame_samples
        self.samples += len(samples)
        for frame in reversed(self._mute):
            left, right = frame * hop - start, (frame + 1) * hop - start
            if right <= 0:
                break  # frames are in order: all earlier ones are already out
            samples[max(0, left) : max(0, right)] = 0
        return samples
