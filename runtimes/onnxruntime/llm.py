"""The LLM on ONNX Runtime: embedding rows from the mapped file, body (and TTS adapter) with bounded KV caches, heads.

A decode step binds nothing: inputs are written into buffers that were bound once per state and row count.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgeomni.arrays import F32, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.frame_embedding import FrameEmbedding
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.onnxruntime import captured
from edgeomni.runtimes.onnxruntime.kv_cache import Buffers, Stack, cache_type
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, interruptible, translated
from edgeomni.spec import OmniSpec

_SPARE_STATES = 4
_PREFILL_FRAMES = 128
"""Frames of one row appended at once: activations of a long prompt would outweigh the weights."""


class OrtHidden(NamedTuple):
    """Normed hidden of the last position: `text` [rows, D], and `audio`, which with a TTS adapter is its [1, D]."""

    text: F32
    audio: F32


@dataclass(eq=False)
class OrtState:
    """KV caches of one turn, `length` frames of `rows` active rows in them."""

    buffers: tuple[Buffers, ...]
    capacity: int
    max_rows: int
    length: int = 0
    rows: int = 1


class OrtLanguageModel(ParallelHeads[OrtHidden]):
    """Fulfils components.LanguageModel. Sessions and tables are shared; all that a turn changes is in its OrtState.

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
        if not 1 <= max_frames <= self._context:
            raise EngineError(f"max_frames {max_frames}: this export holds 1 to {self._context} frames")
        room = self._context if self._fixed else max_frames  # TensorRT's graphs have caches of one size
        buffers = self._reused(rows, room) or self._allocated(rows, room)
        state = OrtState(buffers, max_frames, rows)
        weakref.finalize(state, self._spare.append, buffers).atexit = False
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: OrtState, interrupt: Interrupt | None = None
    ) -> OrtHidden:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit."""
        rows, _, frames = ids.shape
        if rows != state.rows or not frames:
            raise EngineError(f"ids have {rows} row(s) of {frames} frames, but {state.rows} row(s) are active")
        if state.length + frames > state.capacity:
            raise EngineError(f"the cache holds {state.capacity} frames; {state.length} + {frames} are too many")
        embeds = self._embedding.embed(ids, features)
        at_once = _PREFILL_FRAMES if rows == 1 else 1  # behind cached frames the operator takes several of one row only
        for i in range(0, frames, at_once):
            hidden = self._append(embeds[:, i : i + at_once], state, interrupt)
        return hidden

    def fork(self, state: OrtState) -> None:
        if state.max_rows < state.rows + 1:
            raise EngineError(f"the state was started for {state.max_rows} row(s), so it cannot be forked")
        state.buffers[0].copy_row(0, state.rows, state.length)
        state.rows += 1

    def drop(self, state: OrtState, row: int) -> None:
        if row != state.rows - 1 or row == 0:
            raise EngineError(f"only the last of several rows can be dropped, not row {row} of {state.rows}")
        state.rows -= 1

    def text_logits(self, hidden: OrtHidden, row: int) -> F32:
        return self._logits(self._text_head, hidden.text, row)

    def audio_logits(self, hidden: OrtHidden, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab]. With a TTS adapter only row 0 has audio: raises EngineError for others."""
        if row >= len(hidden.audio):
            raise EngineError(f"row {row} has no audio logits: the TTS adapter runs on row 0 only")
        layout = self._spec.layout
        return self._logits(self._audio_head, hidden.audio, row).reshape(layout.streams, layout.audio_vocab)

    def close(self) -> None:
        """Gives back the buffers kept for later turns; sessions and tables go with the object."""
        self._spare.clear()

    def _append(self, embeds: F32, state: OrtState, interrupt: Interrupt | None) -> OrtHidden:
        remedy = "check memory, or verify the bundle with `edgeomni verify`"
        with interruptible(interrupt, "the LLM failed", remedy) as options:
            text, body_out = state.buffers[0].run(embeds, state.length, options)
            audio = text
            if body_out is not None:
                audio, _ = state.buffers[1].run(body_out[:1], state.length, options)
        state.length += embeds.shape[1]
        return OrtHidden(text, audio)

    def _logits(self, head: Any, hidden: F32, row: int) -> F32:
        with translated("a head failed", "check memory, or verify the bundle with `edgeomni verify`"):
            logits: F32 = head.run(None, {"hidden": hidden[None, row : row + 1]})[0]
        return logits.reshape(-1)

    def _reused(self, rows: int, frames: int) -> tuple[Buffers, ...] | None:
        for _ in range(len(self._spare)):
            try:
                buffers = self._spare.popleft()
            except IndexError:  # another thread took it
                return None
            if buffers[0].rows >= rows and buffers[0].frames >= frames:
                return buffers
            self._spare.append(buffers)
        return None

    def _allocated(self, rows: int, frames: int) -> tuple[Buffers, ...]:
        return tuple(Buffers(stack, rows if i == 0 else 1, frames) for i, stack in enumerate(self._stacks))
