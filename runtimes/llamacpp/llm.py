"""The LLM on llama.cpp: embedding rows and heads from one file on ggml, the body from the other on llama.cpp."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeomni.arrays import F32, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.quantize.schemes import parse
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.ggml.heads import Heads
from edgeomni.runtimes.llamacpp.body import Body, Context
from edgeomni.spec import OmniSpec

_SPARE_CONTEXTS = 4
_ONE_BY_ONE = ("q5_0", "q8_0")
"""Kinds whose two rows are faster in two calls: ggml's kernel for two columns of them is slow (2.7 times one row)."""


@dataclass(eq=False)
class LlamaState:
    """KV cache of one turn, `length` frames of `rows` active rows in it."""

    context: Context
    capacity: int
    max_rows: int
    length: int = 0
    rows: int = 1


class LlamaLanguageModel(ParallelHeads[F32]):
    """Fulfils components.LanguageModel; a hidden is float32 [rows, D], normed. What a turn changes is in its state.

    `path` is the bundle's directory. Raises BundleError for files that are not this model's, EngineError where
    llama-cpp-python is missing or cannot load them.
    """

    def __init__(self, path: Path, component: Component, spec: OmniSpec, threads: int | None) -> None:
        from edgeomni.quantize import gguf_kinds  # makes the kinds known  # noqa: F401

        threads = threads or os.cpu_count() or 1
        self._spec, self._context = spec, int(component.meta["context"])
        self._one_by_one = parse(component.scheme["body.linear"]).kind in _ONE_BY_ONE
        self._heads = Heads(path / component.graphs["heads"].path, spec, threads)
        self._body = Body(path / component.graphs["body"].path, spec.body, threads)
        self._contexts, self._spare = set[Context](), deque[Context]()

    def start(self, rows: int, max_frames: int) -> LlamaState:
        """An empty state, its context reused from an earlier turn where it is large enough."""
        if not 1 <= max_frames <= self._context:
            raise EngineError(f"max_frames {max_frames}: this export holds 1 to {self._context} frames")
        context = self._reused(rows, max_frames) or self._new(rows, max_frames)
        state = LlamaState(context, max_frames, rows)
        weakref.finalize(state, self._given_back, context).atexit = False
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: LlamaState, interrupt: Interrupt | None = None
    ) -> F32:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit."""
        rows, _, frames = ids.shape
        if rows != state.rows or not frames:
            raise EngineError(f"ids have {rows} row(s) of {frames} frames, but {state.rows} row(s) are active")
        if state.length + frames > state.capacity:
            raise EngineError(f"the cache holds {state.capacity} frames; {state.length} + {frames} are too many")
        together = not (self._one_by_one and rows > 1)
        hidden = state.context.append(self.embed(ids, features), state.length, interrupt, together=together)
        state.length += frames
        return hidden

    def fork(self, state: LlamaState) -> None:
        if state.max_rows < state.rows + 1:
            raise EngineError(f"the state was started for {state.max_rows} row(s), so it cannot be forked")
        state.context.copy_row(0, state.rows)
        state.rows += 1

    def drop(self, state: LlamaState, row: int) -> None:
        if row != state.rows - 1 or row == 0:
            raise EngineError(f"only the last of several rows can be dropped, not row {row} of {state.rows}")
        state.context.forget_row(row)
        state.rows -= 1

    def text_logits(self, hidden: F32, row: int) -> F32:
        return self._heads.text_logits(hidden[row])

    def audio_logits(self, hidden: F32, row: int, given: I64 | None = None) -> F32:
        return self._heads.audio_logits(hidden[row])

    def close(self) -> None:
        """Frees the model and every context; a state of before is of no more use."""
        self._spare.clear()
        while self._contexts:
            self._contexts.pop().close()
        self._heads.close()
        self._body.close()

    def embed(self, ids: I32, features: Sequence[Features] = ()) -> F32:
        """ids [rows, K+1, t] -> [rows, t, D]: the mean over the K+1 streams, K of them replaced by a feature."""
        streams, frames = ids.shape[1:]
        audio, text = self._heads.embedding(ids)
        for segment in features:
            if segment.start < 0 or segment.stop > frames:
                raise EngineError(
                    f"features for positions {segment.start} to {segment.stop} do not fit {frames} positions of ids"
                )
            audio[:, segment.start : segment.stop] = segment.values * np.float32(streams - 1)
        return np.ascontiguousarray((audio + text) / np.float32(streams))

    def _reused(self, rows: int, frames: int) -> Context | None:
        for _ in range(len(self._spare)):
            try:
                context = self._spare.popleft()
            except IndexError:  # another thread took it
                return None
            if context.rows >= rows and context.frames >= frames:
                context.clear()
                return context
            self._spare.append(context)
        return None

    def _new(self, rows: int, frames: int) -> Context:
        context = Context(self._body, rows, frames)
        self._contexts.add(context)
        return context

    def _given_back(self, context: Context) -> None:
        if context not in self._contexts:  # closed meanwhile
            return
        self._spare.append(context)
        if len(self._spare) > _SPARE_CONTEXTS:
            oldest = self._spare.popleft()
            self._contexts.discard(oldest)
            oldest.close()
