"""The LLM on OpenVINO: embedding rows from the mapped file, stateful body (and TTS adapter), heads."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from edgeomni.arrays import F32, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.frame_embedding import FrameEmbedding
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.common.turn_state import Hidden, TurnState, check_audio_row, check_start
from edgeomni.runtimes.openvino.blocks import Blocks
from edgeomni.runtimes.openvino.models import Model, ModelFactory
from edgeomni.spec import OmniSpec

_SPARE_STATES = 4
OvState = TurnState[tuple[Blocks, ...]]


class OvLanguageModel(ParallelHeads[Hidden]):
    """Fulfils components.LanguageModel. Models and tables are shared; all that a turn changes is in its state.

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
        check_start(rows, max_frames, self._context)
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
    ) -> Hidden:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit."""
        state.check_ids(ids)
        text, body_out = state.caches[0].append(self._embedding.embed(ids, features), state.length, interrupt)
        audio = text
        if body_out is not None:
            audio, _ = state.caches[1].append(body_out[:1], state.length, interrupt)
        state.length += ids.shape[2]
        return Hidden(text, audio)

    def fork(self, state: OvState) -> None:
        state.next_row()
        state.caches[0].fork()
        state.rows += 1

    def drop(self, state: OvState, row: int) -> None:
        state.check_last(row)
        state.caches[0].drop()
        state.rows -= 1

    def text_logits(self, hidden: Hidden, row: int) -> F32:
        return _logits(self._text_head, hidden.text, row)

    def audio_logits(self, hidden: Hidden, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab]. With a TTS adapter only row 0 has audio: raises EngineError for others."""
        check_audio_row(row, len(hidden.audio))
        layout = self._spec.layout
        return _logits(self._audio_head, hidden.audio, row).reshape(layout.streams, layout.audio_vocab)

    def close(self) -> None:
        """Gives back the caches kept for later turns; models and tables go with the object."""
        self._spare.clear()


def _logits(head: Model, hidden: F32, row: int) -> F32:
    return head.run({"hidden": hidden[None, row : row + 1]})["logits"].reshape(-1)
