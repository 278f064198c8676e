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

    As on a real engine, rows, capacity and the order of calls are checked (EngineError). Audio is scripted for row 0
    and text for the last active row; every other row answers with ids that are shifted by one, so that a caller who
    asks the wrong row notices.
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
        for segment in features:
            _demand(segment.start >= 0 and segment.stop <= frames, f"features {segment.start} to {segment.stop}")
        state.fed.append(ids)
        state.features.append(list(features))
        state.length += frames
        return FakeHidden(state, rows)

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


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise EngineError(f"the fake LLM was used wrongly: {what}")


class FakeCodec:
    """Holds one codec frame back, as a non-causal codec does."""

    def __init__(self, spec: OmniSpec, first_push: int = 3, push_multiple: int = 1) -> None:
        self.spec, self.first_push, self.push_multiple = spec.codec, first_push, push_multiple
        self.pushes: list[int] = []

    def open(self, noise_seed: int | None = None) -> list[float]:
        return []

    def decode(self, codes: Sequence[I64], state: list[float], last: bool) -> F32:
        n = len(codes[0]) // self.spec.ids_per_level[0]
        self.pushes.append(n)
        levels = zip(codes, self.spec.ids_per_level, strict=True)
        per_frame = np.concatenate([c.reshape(n, per) for c, per in levels], axis=1)
        state.extend(per_frame.mean(1).tolist())
        ready = len(state) if last else max(0, len(state) - 1)
        out = np.repeat(np.array(state[:ready], np.float32), self.spec.frame_samples)
        del state[:ready]
        return out

    def close(self) -> None:
        pass


def components(spec: OmniSpec, frames: Sequence[Sequence[int]], **codec: int) -> Components:
    return Components(FakeEncoder(spec), FakeLanguageModel(spec, frames), FakeCodec(spec, **codec))
