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
from edgeomni.components import Components
from edgeomni.interrupt import Interrupt
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
    rows: int
    active: int = 1
    length: int = 0
    calls: int = 0
    fed: list[I32] = field(default_factory=list)


class FakeLanguageModel:
    """`frames` scripts the answer: each an audio id per stream, then the text id, unshifted."""

    def __init__(self, spec: OmniSpec, frames: Sequence[Sequence[int]]) -> None:
        self.spec, self.frames = spec, [list(f) for f in frames]
        self.states: WeakSet[FakeState] = WeakSet()
        """Of turns that still run."""
        self.text_heads = self.audio_heads = 0

    def start(self, rows: int, max_frames: int) -> FakeState:
        state = FakeState(rows)
        self.states.add(state)
        return state

    def forward(self, ids: I32, features: F32 | None, state: FakeState, feature_start: int = 1) -> int:
        assert ids.shape[0] == state.active, "rows fed must be the active rows"
        state.fed.append(ids)
        state.length += ids.shape[2]
        if state.rows == 2 and state.active == 1 and state.calls == 0:
            return -1  # the shared prefix: its hidden is never asked for
        state.calls += 1
        return state.calls - 1

    def fork(self, state: FakeState) -> None:
        state.active = 2

    def drop(self, state: FakeState, row: int) -> None:
        state.active = row

    def text_logits(self, hidden: int, row: int) -> F32:
        self.text_heads += 1
        return self._one_hot(self._frame(hidden)[-1], self.spec.layout.text_vocab)

    def audio_logits(self, hidden: int, row: int) -> F32:
        self.audio_heads += 1
        vocab = self.spec.layout.audio_vocab
        return np.stack([self._one_hot(i, vocab) for i in self._frame(hidden)[:-1]])

    def close(self) -> None:
        pass

    def _frame(self, hidden: int) -> list[int]:
        return self.frames[min(hidden, len(self.frames) - 1)]

    @staticmethod
    def _one_hot(index: int, size: int) -> F32:
        logits = np.zeros(size, np.float32)
        logits[index] = 10
        return logits


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
