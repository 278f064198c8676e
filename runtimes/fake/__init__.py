"""Scripted components: the loop, the CLI and servers can be tested without an engine or weights.

The fake LLM answers frame i of a turn with the i-th scripted frame (the last one repeats) and records what it was
fed; the fake codec turns codec frame f into frame_samples copies of the mean of its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import numpy as np

from edgeomni.arrays import F32, I32, I64
from edgeomni.components import Components, Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.spec import OmniSpec


class FakeEncoder:
    """Features that name their own position: feature i is all i."""

    def __init__(self, spec: OmniSpec) -> None:
        self.spec = spec
        self.closed = False

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        if interrupt is not None:
            interrupt.check()
        n = min(wanted or mel.shape[1] // 2, mel.shape[1] // 2)
        return np.repeat(np.arange(n, dtype=np.float32)[:, None], self.spec.body.width, axis=1)

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class FakeState:
    """What was fed to one turn: `fed` holds the ids of each forward, `features` the segments given with them."""

    max_rows: int
    max_frames: int
    rows: int = 1
    length: int = 0
    answered: int = 0
    fed: list[I32] = field(default_factory=list)
    features: list[list[Features]] = field(default_factory=list)


@dataclass(eq=False)
class FakeHidden:
    """Takes the next scripted frame when a head first asks for it, so that prompt pieces use none up."""

    state: FakeState
    rows: int
    frame: int | None = None

    def index(self) -> int:
        if self.frame is None:
            self.frame = self.state.answered
            self.state.answered += 1
        return self.frame


class FakeLanguageModel(ParallelHeads[FakeHidden]):
    """`frames` scripts the answer: each an audio id per stream, then the text id, unshifted.

    As on a real engine, ids, features, rows, capacity and the order of calls are checked (EngineError). Audio is
    scripted for row 0 and text for the last active row; every other row answers with ids that are shifted by one, so
    that a caller who asks the wrong row notices.
    """

    def __init__(self, spec: OmniSpec, frames: Sequence[Sequence[int]]) -> None:
        self.spec, self.frames = spec, [list(f) for f in frames]
        self.states: WeakSet[FakeState] = WeakSet()
        """Of turns that still run."""
        self.text_heads = self.audio_heads = 0

    def start(self, rows: int, max_frames: int) -> FakeState:
        state = FakeState(rows, max_frames)
        self.states.add(state)
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: FakeState, interrupt: Interrupt | None = None
    ) -> FakeHidden:
        rows, streams, frames = ids.shape
        _demand(rows == state.rows, f"{rows} rows fed, {state.rows} active")
        _demand(streams == self.spec.layout.streams + 1 and frames > 0, f"ids of shape {ids.shape}")
        _demand(state.length + frames <= state.max_frames, f"{state.length} + {frames} of {state.max_frames} frames")
        self._demand_ids(ids)
        for segment in features:
            _demand(segment.start >= 0 and segment.stop <= frames, f"features {segment.start} to {segment.stop}")
            shape, width = segment.values.shape, self.spec.body.width
            _demand(len(shape) == 2 and shape[0] > 0 and shape[1] == width, f"features of shape {shape}")
        state.fed.append(ids)
        state.features.append(list(features))
        state.length += frames
        return FakeHidden(state, rows)

    def _demand_ids(self, ids: I32) -> None:
        """Every stream's ids lie in its own block of the joint vocabulary."""
        layout = self.spec.layout
        _demand(ids.dtype == np.int32 and ids.flags.c_contiguous, f"ids are {ids.dtype}, or not contiguous")
        blocks = [(layout.shift(k), layout.audio_vocab) for k in range(layout.streams)] + [(0, layout.text_vocab)]
        for stream, (first, size) in enumerate(blocks):
            given = ids[:, stream]
            inside = (given >= first) & (given < first + size)
            _demand(bool(inside.all()), f"stream {stream} was fed {given[~inside][:3]}, its block is {first} + {size}")

    def fork(self, state: FakeState) -> None:
        _demand(state.rows == 1 and state.max_rows == 2 and state.length > 0, "fork needs one prefilled row of two")
        state.rows = 2

    def drop(self, state: FakeState, row: int) -> None:
        _demand(0 < row == state.rows - 1, f"row {row} of {state.rows} cannot be dropped")
        state.rows -= 1

    def text_logits(self, hidden: FakeHidden, row: int) -> F32:
        self.text_heads += 1
        return self._one_hot(self._scripted(hidden, row, -1, hidden.rows - 1), self.spec.layout.text_vocab)

    def audio_logits(self, hidden: FakeHidden, row: int, given: I64 | None = None) -> F32:
        self.audio_heads += 1
        vocab, streams = self.spec.layout.audio_vocab, self.spec.layout.streams
        return np.stack([self._one_hot(self._scripted(hidden, row, k, 0), vocab) for k in range(streams)])

    def close(self) -> None:
        pass

    def _scripted(self, hidden: FakeHidden, row: int, stream: int, right_row: int) -> int:
        _demand(0 <= row < hidden.rows, f"row {row} asked of {hidden.rows}")
        frame = self.frames[min(hidden.index(), len(self.frames) - 1)]
        return frame[stream] if row == right_row else frame[stream] + 1

    @staticmethod
    def _one_hot(index: int, size: int) -> F32:
        logits = np.zeros(size, np.float32)
        logits[index % size] = 10
        return logits


def _demand(condition: bool, what: str, part: str = "LLM") -> None:
    if not condition:
        raise EngineError(f"the fake {part} was used wrongly: {what}")


@dataclass(eq=False)
class FakeStream:
    """One answer's codec state: the means still held back, how much came, and whether `last` was said."""

    held: list[float] = field(default_factory=list)
    pushes: int = 0
    ended: bool = False


class FakeCodec:
    """Holds one codec frame back, as a non-causal codec does. Checks the rules of a push and its ids (EngineError)."""

    def __init__(self, spec: OmniSpec, first_push: int = 3, push_multiple: int = 1) -> None:
        self.spec, self.first_push, self.push_multiple = spec.codec, first_push, push_multiple
        self.pushes: list[int] = []
        """Codec frames of each push."""
        self.codes: list[list[I64]] = [[] for _ in spec.codec.vq_strides]
        """All ids pushed, per level a list of arrays."""
        self.lasts: list[bool] = []
        self.seeds: list[int | None] = []

    def open(self, noise_seed: int | None = None) -> FakeStream:
        self.seeds.append(noise_seed)
        return FakeStream()

    def decode(self, codes: Sequence[I64], state: FakeStream, last: bool) -> F32:
        n = len(codes[0]) // self.spec.ids_per_level[0]
        self._demand_push(codes, n, state, last)
        self.pushes.append(n)
        self.lasts.append(last)
        for level, ids in zip(self.codes, codes, strict=True):
            level.append(ids)
        levels = zip(codes, self.spec.ids_per_level, strict=True)
        per_frame = np.concatenate([c.reshape(n, per) for c, per in levels], axis=1)
        state.held.extend(per_frame.mean(1).tolist())
        state.pushes, state.ended = state.pushes + 1, last
        ready = len(state.held) if last else max(0, len(state.held) - 1)
        out = np.repeat(np.array(state.held[:ready], np.float32), self.spec.frame_samples)
        del state.held[:ready]
        return out

    def _demand_push(self, codes: Sequence[I64], frames: int, state: FakeStream, last: bool) -> None:
        expected = [frames * n for n in self.spec.ids_per_level]
        _demand([len(c) for c in codes] == expected, f"{[len(c) for c in codes]} ids per level", "codec")
        for ids in codes:
            inside = ((ids >= 0) & (ids < self.spec.codebook_size)).all()
            _demand(ids.dtype == np.int64 and bool(inside), f"ids {ids[:8]}", "codec")
        _demand(not state.ended, "a push after the last one", "codec")
        if last:
            _demand(frames > 0 or state.pushes > 0, "the end of a stream that never began", "codec")
        else:
            _demand(frames > 0 and frames % self.push_multiple == 0, f"a push of {frames} frames", "codec")
            _demand(state.pushes > 0 or frames >= self.first_push, f"a first push of {frames} frames", "codec")

    def close(self) -> None:
        pass


def components(spec: OmniSpec, frames: Sequence[Sequence[int]], **codec: int) -> Components:
    return Components(FakeEncoder(spec), FakeLanguageModel(spec, frames), FakeCodec(spec, **codec))
