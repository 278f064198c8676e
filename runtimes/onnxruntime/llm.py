"""The LLM on ONNX Runtime: embedding rows from the mapped file, body (and TTS adapter) with bounded KV caches, heads.

A decode step binds nothing: inputs are written into buffers that were bound once per state and row count.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeomni.arrays import F32, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.frame_embedding import FrameEmbedding
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.common.turn_state import Hidden, TurnState, check_audio_row, check_start, taken
from edgeomni.runtimes.onnxruntime import captured
from edgeomni.runtimes.onnxruntime.kv_cache import Buffers, Stack, cache_type
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, interruptible, translated
from edgeomni.spec import OmniSpec

_SPARE_STATES = 4
_PREFILL_FRAMES = 128
"""Frames of one row appended at once: activations of a long prompt would outweigh the weights."""


OrtState = TurnState[tuple[Buffers, ...]]


class OrtLanguageModel(ParallelHeads[Hidden]):
    """Fulfils components.LanguageModel. Sessions and tables are shared; all that a turn changes is in its state.

    `path` is the bundle's directory. Raises BundleError for a table that cannot be read, EngineError for a graph
    that cannot be loaded.
    """

    def __init__(self, path: Path, component: Component, spec: OmniSpec, sessions: SessionFactory) -> None:
        self._spec, self._context = spec, int(component.meta["context"])
        order = sorted(component.graphs, key=lambda role: not role.endswith("head"))
        kind = component.meta.get("attention", "static")
        records = captured.wanted(sessions.device, kind)
        # Heads first: while a weight is packed it is in memory twice, and theirs are the largest.
        graphs = {
            role: sessions.open(path / component.graphs[role].path, records=records and not role.endswith("head"))
            for role in order
        }
        self._text_head, self._audio_head = graphs["text_head"], graphs["audio_head"]
        self._fixed = kind == "static"
        self._stacks = tuple(
            Stack(
                graphs[role],
                kind,
                spec.body,
                layers,
                sessions.memory,
                puts_out_body=role == "body" and "tts" in graphs,
                kv=cache_type(graphs[role]),
                records=records,
            )
            for role, layers in (("body", spec.body.layers), ("tts", spec.tts_layers))
            if role in graphs
        )
        self._embedding = FrameEmbedding(path, component.meta["tables"], spec.layout)
        self._spare: deque[tuple[Buffers, ...]] = deque(maxlen=_SPARE_STATES)

    def start(self, rows: int, max_frames: int) -> OrtState:
        """An empty state, its buffers reused from an earlier turn where they are large enough."""
        check_start(rows, max_frames, self._context)
        room = self._context if self._fixed else max_frames  # TensorRT's graphs have caches of one size
        buffers = self._reused(rows, room) or self._allocated(rows, room)
        state = OrtState(buffers, max_frames, rows)
        weakref.finalize(state, self._spare.append, buffers).atexit = False
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: OrtState, interrupt: Interrupt | None = None
    ) -> Hidden:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit."""
        state.check_ids(ids)
        rows, _, frames = ids.shape
        embeds = self._embedding.embed(ids, features)
        at_once = _PREFILL_FRAMES if rows == 1 else 1  # behind cached frames the operator takes several of one row only
        for i in range(0, frames, at_once):
            hidden = self._append(embeds[:, i : i + at_once], state, interrupt)
        return hidden

    def fork(self, state: OrtState) -> None:
        state.caches[0].copy_row(0, state.next_row(), state.length)
        state.rows += 1

    def drop(self, state: OrtState, row: int) -> None:
        state.check_last(row)
        state.rows -= 1

    def text_logits(self, hidden: Hidden, row: int) -> F32:
        return self._logits(self._text_head, hidden.text, row)

    def audio_logits(self, hidden: Hidden, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab]. With a TTS adapter only row 0 has audio: raises EngineError for others."""
        check_audio_row(row, len(hidden.audio))
        layout = self._spec.layout
        return self._logits(self._audio_head, hidden.audio, row).reshape(layout.streams, layout.audio_vocab)

    def close(self) -> None:
        """Gives back the buffers kept for later turns; sessions and tables go with the object."""
        self._spare.clear()

    def _append(self, embeds: F32, state: OrtState, interrupt: Interrupt | None) -> Hidden:
        remedy = "check memory, or verify the bundle with `edgeomni verify`"
        with interruptible(interrupt, "the LLM failed", remedy) as options:
            text, body_out = state.caches[0].run(embeds, state.length, options)
            audio = text
            if body_out is not None:
                audio, _ = state.caches[1].run(body_out[:1], state.length, options)
        state.length += embeds.shape[1]
        return Hidden(text, audio)

    def _logits(self, head: Any, hidden: F32, row: int) -> F32:
        with translated("a head failed", "check memory, or verify the bundle with `edgeomni verify`"):
            logits: F32 = head.run(None, {"hidden": hidden[None, row : row + 1]})[0]
        return logits.reshape(-1)

    def _reused(self, rows: int, frames: int) -> tuple[Buffers, ...] | None:
        return taken(self._spare, lambda buffers: buffers[0].rows >= rows and buffers[0].frames >= frames)

    def _allocated(self, rows: int, frames: int) -> tuple[Buffers, ...]:
        return tuple(Buffers(stack, rows if i == 0 else 1, frames) for i, stack in enumerate(self._stacks))
