"""The three protocols a runtime fulfils. The loop (generate.py) knows nothing else of an engine.

All arrays are numpy, float32 / int32 / int64 as stated, C-contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .arrays import F32, I32, I64
from .interrupt import Interrupt

State = Any
"""Engine-private: the KV cache of one turn, with `length` (frames cached so far). Dropping it frees the cache."""
Hidden = Any
"""Engine-private: what the heads read of the last position of each active row."""
CodecState = Any
"""Engine-private: what the codec keeps between pushes."""


class Encoder(Protocol):
    """Speech encoder with its adapter."""

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even, t // 2 <= encoder context) -> features [t // 2, D].

        With `wanted` only the first so many, which may cost less. Raises Interrupted where `interrupt` is set before
        the features are there; engines that can end a call under way do so, the others finish it.
        """
        ...

    def close(self) -> None:
        """Gives back what the encoder holds. It is not used afterwards."""
        ...


class LanguageModel(Protocol):
    """Embedding, transformer body, text head and audio heads.

    Ids are in the joint vocabulary (layer-shifted), [rows, K+1, t], audio streams first, text last.
    """

    def start(self, rows: int, max_frames: int) -> State:
        """A state with room for `rows` rows of `max_frames` frames, empty, one row active."""
        ...

    def forward(self, ids: I32, features: F32 | None, state: State, feature_start: int = 1) -> Hidden:
        """Append t frames to each active row; returns the last position's hidden.

        `features` [F, D] replace the K audio embeddings at positions feature_start .. feature_start+F-1 of
        the ids given (row by row the same).
        """
        ...

    def fork(self, state: State) -> None:
        """One prefilled row -> two active rows, KV copied."""
        ...

    def drop(self, state: State, row: int) -> None:
        """Row `row` (the last active one) is no longer wanted."""
        ...

    def text_logits(self, hidden: Hidden, row: int) -> F32:
        """[text_vocab] of that row."""
        ...

    def audio_logits(self, hidden: Hidden, row: int) -> F32:
        """[K, audio_vocab] of that row."""
        ...

    def close(self) -> None: ...


class CodecDecoder(Protocol):
    """Codes in, waveform out, streaming exactly: joined pushes equal one offline decode."""

    first_push: int
    """Codec frames that the first push must hold, unless it is also the last."""
    push_multiple: int
    """Every push but the last holds a multiple of this many codec frames (1, or whole attention windows)."""

    def open(self, noise_seed: int | None = None) -> CodecState:
        """A fresh stream. `noise_seed` switches the codec's noise on (SNAC), seeded; None is off."""
        ...

    def decode(self, codes: Sequence[I64], state: CodecState, last: bool) -> F32:
        """codes[level] is int64 [n * ids_per_level]; returns the samples that became final, [samples] float32.

        With `last` the rest of the stream is emitted: all pushes together give exactly
        frames * frame_samples samples. `last` with no codes is allowed when something was pushed before.
        """
        ...

    def close(self) -> None: ...


@dataclass
class Components:
    """What a Session runs on: each may come from its own engine."""

    encoder: Encoder
    llm: LanguageModel
    codec: CodecDecoder

    def close(self) -> None:
        """Closes all three. Only their owner does that: sessions may share them."""
        for part in (self.encoder, self.llm, self.codec):
            part.close()
