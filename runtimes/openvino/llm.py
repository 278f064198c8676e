"""The LLM on OpenVINO: embedding rows from the mapped file, stateful body (and TTS adapter), heads."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgeomni.arrays import F32, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.frame_embedding import FrameEmbedding
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.openvino.blocks import Blocks
from edgeomni.runtimes.openvino.models import Model, ModelFactory
from edgeomni.spec import OmniSpec

_SPARE_STATES = 4


class OvHidden(NamedTuple):
    """Normed hidden of the last position: `text` [rows, D], and `audio`, which with a TTS adapter is its [1, D]."""

    text: F32
    audio: F32


@dataclass(eq=False)
class OvState:
    """KV caches of one turn, `length` frames of `rows` active rows in them."""

    blocks: tuple[Blocks, ...]
    capacity: int
    max_rows: int
    length: int = 0
    rows: int = 1


class OvLanguageModel(ParallelHeads[OvHidden]):
    """Fulfils components.LanguageModel. Models and tables are shared; all that a turn changes is in its OvState.

    `path` is the bundle's directory. Raises BundleError for a table that cannot be read, EngineError for a model that
    cannot be loaded.
    """

    def __init__(self, path: Path, component: Component, spec: OmniSpec, models: ModelFactory) -> None:
        self._spec, self._context = spec, int(component.meta["context"])
        opened = {role: models.open(path / graph.path) for role, graph in component.graphs.items()}
        self._text_head, self._audio_head = opened["text_head"], opened["audio_head"]
        self._stacks = tuple(opened[role] for role in ("body", "tts") if role in opened)
        self._embedding = FrameEmbedding(path, component.meta["tables"], spec.layout)
        self._spare: deque[tuple[Blocks, ...]] = deque(maxlen=_SPARE_STATES)

    def start(self, rows: int, max_frames: int) -> OvState:
        """An empty state. OpenVINO's own caches grow with their frames, so that one serves turns of any length."""
        if not 1 <= max_frames <= self._context:
            raise EngineError(f"max_frames {max_frames}: this export holds 1 to {self._context} frames")
        try:
            blocks = self._spare.popleft()
        except IndexError:
            blocks = tuple(Blocks(model) for model in self._stacks)
        for part in blocks:
            part.clear()
        state = OvState(blocks, max_frames, rows)
        weakref.finalize(state, self._spare.append, blocks).atexit = False
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: OvState, interrupt: Interrupt | None = None
    ) -> OvHidden:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit."""
        rows, _, frames = ids.shape
        if rows != state.rows or not frames:
            raise EngineError(f"ids have {rows} row(s) of {frames} frames, but {state.rows} row(s) are active")
        if state.length + frames > state.capacity:
            raise EngineError(f"the cache holds {state.capacity} frames; {state.length} + {frames} are too many")
        text, body_out = state.blocks[0].append(self._embedding.embed(ids, features), state.length, interrupt)
        audio = text
        if body_out is not None:
            audio, _ = state.blocks[1].append(body_out[:1], state.length, interrupt)
        state.length += frames
        return OvHidden(text, audio)

    def fork(self, state: OvState) -> None:
        if state.max_rows < state.rows + 1:
            raise EngineError(f"the state was started for {state.max_rows} row(s), so it cannot be forked")
        state.blocks[0].fork()
        state.rows += 1

    def drop(self, state: OvState, row: int) -> None:
        if row != state.rows - 1 or row == 0:
            raise EngineError(f"only the last of several rows can be dropped, not row {row} of {state.rows}")
        state.blocks[0].drop()
        state.rows -= 1

    def text_logits(self, hidden: OvHidden, row: int) -> F32:
        return _logits(self._text_head, hidden.text, row)

    def audio_logits(self, hidden: OvHidden, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab]. With a TTS adapter only row 0 has audio: raises EngineError for others."""
        if row >= len(hidden.audio):
            raise EngineError(f"row {row} has no audio logits: the TTS adapter runs on row 0 only")
        layout = self._spec.layout
        return _logits(self._audio_head, hidden.audio, row).reshape(layout.streams, layout.audio_vocab)

    def close(self) -> None:
        """Gives back the caches kept for later turns; models and tables go with the object."""
        self._spare.clear()


def _logits(head: Model, hidden: F32, row: int) -> F32:
    return head.run({"hidden": hidden[None, row : row + 1]})["logits"].reshape(-1)
