"""The LLM on TensorRT: embedding rows from the mapped file, body (and TTS adapter) with static KV caches, heads.

A decode frame is three launches of captured graphs (body, text head, audio head); between them nothing but ids and the
text's logits comes to the host, where text is chosen.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, F64, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.frame_embedding import FrameEmbedding
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.common.turn_state import TurnState, check_audio_row, check_start
from edgeomni.runtimes.tensorrt.engine import Engine
from edgeomni.runtimes.tensorrt.heads import Head
from edgeomni.runtimes.tensorrt.opening import Engines
from edgeomni.runtimes.tensorrt.stacks import POSITIONS, ROWS, Buffers, Outputs, Stack, Staging
from edgeomni.sampling import Sampling
from edgeomni.spec import OmniSpec

_SPARE_STATES = 4
"""Caches kept for later turns, at the real shape 50 MB each in half precision."""
TrtState = TurnState[Buffers]


class TrtLanguageModel(ParallelHeads[Outputs]):
    """Fulfils components.LanguageModel. Engines and tables are shared; all that a turn changes is in its state.

    Calls of several threads come one after another into the device's one stream. Raises BundleError for a table that
    cannot be read, EngineError for engines that cannot be had, opened, or are not of this model.
    """

    def __init__(self, path: Path, component: Component, spec: OmniSpec, engines: Engines) -> None:
        self._spec, self._context = spec, int(component.meta["context"])
        self._engines, self._device = engines, engines.device
        self._spare: deque[Buffers] = deque()
        self._all: weakref.WeakSet[Buffers] = weakref.WeakSet()
        self._staged: weakref.ref[Outputs] | None = None
        with engines.opening():
            self._embedding = FrameEmbedding(path, component.meta["tables"], spec.layout)
            self._open(component, spec)
            self._spare.append(self._warmed())

    def _open(self, component: Component, spec: OmniSpec) -> None:
        engines, layout, width = self._engines, spec.layout, spec.body.width
        opened = {role: engines.open(role) for role in component.graphs}
        self._stacks: tuple[Stack, ...] = (Stack(opened["body"], spec.body, spec.body.layers, self._context, ROWS),)
        if spec.tts_layers:
            self._stacks += (Stack(opened["tts"], spec.body, spec.tts_layers, self._context, 1),)
        _check_types(opened)
        self._scratch = engines.scratch()
        sizes = {"text_head": layout.text_vocab, "audio_head": layout.streams * layout.audio_vocab}
        self._text_head, self._audio_head = (
            Head(opened[role], engines.arena, self._scratch, width, rows) for role, rows in sizes.items()
        )

    def _warmed(self) -> Buffers:
        """Caches on which every kind of call has run, so that the first turn waits for no preparation of TensorRT's."""
        buffers, width = self._new_buffers(), self._spec.body.width
        try:
            for rows, frames in ((1, buffers.most_frames), (1, 1), (1, 1), (2, 1), (2, 1)):
                self._staged_by(buffers.run(np.zeros((rows, frames, width), np.float32), 0))
            for head in (self._text_head, self._audio_head):
                head.logits(None), head.logits(None)
        except BaseException:
            buffers.arena.close()
            raise
        return buffers

    def start(self, rows: int, max_frames: int) -> TrtState:
        """An empty state. All caches are alike, so that those of an earlier turn serve again."""
        check_start(rows, max_frames, self._context, ROWS)
        with self._engines.using():
            self._device.collect()
            while len(self._spare) > _SPARE_STATES:
                self._spare.popleft().arena.close()
            try:
                buffers = self._spare.pop()
            except IndexError:
                buffers = self._new_buffers()
        state = TrtState(buffers, max_frames, rows)
        weakref.finalize(state, self._spare.append, buffers).atexit = False
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: TrtState, interrupt: Interrupt | None = None
    ) -> Outputs:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit.

        An interrupt ends it before the next piece of a long prompt.
        """
        state.check_ids(ids)
        rows, _, frames = ids.shape
        embeds = self._embedding.embed(ids, features)
        at_once = state.caches.most_frames if rows == 1 else 1
        for i in range(0, frames, at_once):
            if interrupt is not None:
                interrupt.check()
            outputs = self._append(embeds[:, i : i + at_once], state)
        return outputs

    def fork(self, state: TrtState) -> None:
        row = state.next_row()
        with self._engines.using():
            state.caches.copy_row(0, row, state.length)
        state.rows += 1

    def drop(self, state: TrtState, row: int) -> None:
        state.check_last(row)
        state.rows -= 1

    def text_logits(self, hidden: Outputs, row: int) -> F32:
        with self._engines.using():
            staged = self._is_staged(hidden, self._text_head) and row == hidden.rows - 1
            return self._text_head.logits(None if staged else hidden.row("text", row))

    def audio_logits(self, hidden: Outputs, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab]. With a TTS adapter only row 0 has audio: raises EngineError for others."""
        layout = self._spec.layout
        with self._engines.using():
            logits = self._audio_head.logits(self._audio_hidden(hidden, row))
        return logits.reshape(layout.streams, layout.audio_vocab)

    def frame_ids(self, hidden: Outputs, row: int, text_id: int, draws: F64, rule: Sampling) -> I64:
        """Where `rule` is deterministic the engine chooses, if it can, and only the ids leave the device."""
        if not (rule.deterministic and self._audio_head.chooses):
            return super().frame_ids(hidden, row, text_id, draws, rule)
        with self._engines.using():
            return self._audio_head.ids(self._audio_hidden(hidden, row))

    def close(self) -> None:
        """Frees engines and caches; a state of before is of no more use."""
        with self._device.lock:
            for buffers in tuple(self._all):
                buffers.arena.close()
            self._spare.clear()
            self._engines.close()

    def _append(self, embeds: F32, state: TrtState) -> Outputs:
        with self._engines.using():
            outputs = self._staged_by(state.caches.run(embeds, state.length))
        state.length += embeds.shape[1]
        return outputs

    def _staged_by(self, outputs: Outputs) -> Outputs:
        self._staged = weakref.ref(outputs)
        self._text_head.fresh = self._audio_head.fresh = True
        return outputs

    def _new_buffers(self) -> Buffers:
        staging = Staging(self._text_head.staged, self._audio_head.staged, self._text_head.size)
        buffers = Buffers(self._device, self._stacks, self._scratch, staging)
        self._all.add(buffers)
        return buffers

    def _audio_hidden(self, hidden: Outputs, row: int) -> NDArray[np.generic] | None:
        """None where it is staged."""
        check_audio_row(row, hidden.audio_rows)
        return None if self._is_staged(hidden, self._audio_head) and row == 0 else hidden.row("audio", row)

    def _is_staged(self, hidden: Outputs, head: Head) -> bool:
        return head.fresh and self._staged is not None and self._staged() is hidden


def _check_types(opened: Mapping[str, Engine]) -> None:
    """Raises EngineError where one engine would read another's output as another type."""
    audio = "tts" if "tts" in opened else "body"
    links = [(("body", "hidden"), ("text_head", "hidden")), ((audio, "hidden"), ("audio_head", "hidden"))]
    if audio == "tts":
        links.append((("body", "body_out"), ("tts", "inputs_embeds")))
        links += [(("body", name), ("tts", name)) for name in POSITIONS if name in opened["tts"].tensors]
    for (source, out), (target, into) in links:
        opened[source].need(out)
        opened[target].need(into)
        if opened[source].tensors[out].raw != opened[target].tensors[into].raw:
            raise EngineError(f"llm: {source} gives {out} in another type than {target} takes; export the bundle again")
