"""The three protocols that an engine fulfils. The generation loop (generate.py) knows nothing else of an engine.

All arrays are numpy, float32 / int32 / int64 as stated, C-contiguous. `StateT`, `HiddenT` and `CodecStateT` are the
engine's own types: whoever uses an engine hands them back to it without looking inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from .arrays import F32, F64, I32, I64
from .interrupt import Interrupt
from .sampling import Sampling

StateT = TypeVar("StateT")
"""The KV cache of one turn. Dropping the object frees the cache."""
HiddenT = TypeVar("HiddenT")
"""What the heads read of the last position of each active row."""
CodecStateT = TypeVar("CodecStateT")
"""What the codec keeps between pushes."""


@dataclass(frozen=True, eq=False)
class Features:
    """A segment of encoder features: `values` float32 [F, D] belong to positions start .. start + F - 1 of the ids."""

    start: int
    values: F32

    @property
    def stop(self) -> int:
        return self.start + len(self.values)


def features_between(segments: Sequence[Features], start: int, stop: int) -> list[Features]:
    """The parts of `segments` that lie in positions start .. stop - 1, their own starts counted from `start`."""
    cut = []
    for segment in segments:
        first, last = max(segment.start, start), min(segment.stop, stop)
        if first < last:
            cut.append(Features(first - start, segment.values[first - segment.start : last - segment.start]))
    return cut


@dataclass(frozen=True)
class OpenOptions:
    """How a component is opened: `threads` to compute with (None: all cores), on which `device`.

    `side_by_side`: LLM and codec will compute at the same time, so that threads that wait had better not hold a core.
    `as_on_target`: what was made for another device rounds as that device does, even where this one need not; for the
    gate, which judges here what will run there.
    """

    threads: int | None = None
    device: str = "cpu"
    side_by_side: bool = False
    as_on_target: bool = False


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


class LanguageModel(Protocol[StateT, HiddenT]):
    """Embedding, transformer body, text head and audio heads.

    Ids are in the joint vocabulary (layer-shifted), int32 [rows, K+1, t], audio streams first, text last.
    """

    def start(self, rows: int, max_frames: int) -> StateT:
        """A state with room for `rows` rows of `max_frames` frames, empty, one row active."""
        ...

    def forward(
        self, ids: I32, features: Sequence[Features], state: StateT, interrupt: Interrupt | None = None
    ) -> HiddenT:
        """Appends t frames to each active row and returns the last position's hidden.

        Each of `features` replaces the K audio embeddings at its positions of the ids given, alike in every row.
        Raises EngineError for a full state, ids without a row, or features that do not fit the ids, and Interrupted
        where `interrupt` ended the call early (not every engine can); the state is of no more use then.
        """
        ...

    def fork(self, state: StateT) -> None:
        """One prefilled row becomes two active rows, the KV cache copied."""
        ...

    def drop(self, state: StateT, row: int) -> None:
        """Row `row`, which must be the last active one and not row 0, is no longer wanted."""
        ...

    def text_logits(self, hidden: HiddenT, row: int) -> F32:
        """[text_vocab] of that row. The caller may keep the array."""
        ...

    def frame_ids(self, hidden: HiddenT, row: int, text_id: int, draws: F64, rule: Sampling) -> I64:
        """Chooses one audio frame: unshifted ids int64 [K] of that row.

        `draws` float [K] holds one uniform number in [0, 1) per stream, used unless `rule` is deterministic.
        `text_id` is the text id of the same frame, for heads that depend on it.
        """
        ...

    def audio_logits(self, hidden: HiddenT, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab] of that row, for the gate and tests. The caller may keep the array.

        `given` int64 [K] are the frame's own ids, which heads that choose one stream after another are fed with
        (teacher forcing); parallel heads ignore it.
        """
        ...

    def close(self) -> None: ...


class CodecDecoder(Protocol[CodecStateT]):
    """Codes in, waveform out, streaming exactly: joined pushes equal one offline decode."""

    first_push: int
    """Codec frames that the first push must hold, unless it is also the last."""
    push_multiple: int
    """Every push but the last holds a multiple of this many codec frames (1, or whole attention windows)."""

    def open(self, noise_seed: int | None = None) -> CodecStateT:
        """A fresh stream. `noise_seed` switches the codec's noise on (SNAC), seeded; None is off."""
        ...

    def decode(self, codes: Sequence[I64], state: CodecStateT, last: bool) -> F32:
        """codes[level] is int64 [n * ids_per_level]; returns the samples that became final, [samples] float32.

        With `last` the rest of the stream is emitted: all pushes together give exactly
        frames * frame_samples samples. `last` with no codes is allowed when something was pushed before.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class SetsThreads(Protocol):
    """What an LLM or a codec decoder may offer beside its protocol: its number of threads changes between calls.

    The loop uses it where both compute at the same time (overlap.py). A component without it keeps its threads.
    """

    def set_threads(self, threads: int) -> None:
        """From the next call on `decode`, `forward` of a single frame and the heads compute with so many threads.

        Prompts keep all threads that the component was opened with. What is computed must not depend on the number,
        to the bit. Cheap enough to be called between any two frames. Sessions share components, so that a call of
        another session may be under way in another thread: it goes on as it began.
        """
        ...


@dataclass
class Components:
    """What a Session runs on: each may come from its own engine."""

    encoder: Encoder
    llm: LanguageModel[Any, Any]
    codec: CodecDecoder[Any]

    def close(self) -> None:
        """Closes all three. Only their owner does that: sessions may share them."""
        for part in (self.encoder, self.llm, self.codec):
            part.close()
