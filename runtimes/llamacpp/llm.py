"""The LLM on llama.cpp: its blocks (and a TTS adapter's) there, embedding rows and heads from heads.gguf on ggml."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from edgeomni.arrays import F32, I32, I64
from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.quantize import gguf_kinds  # makes the kinds known  # noqa: F401
from edgeomni.quantize.schemes import parse
from edgeomni.runtimes.common.frame_embedding import mean_of_streams
from edgeomni.runtimes.common.parallel_heads import ParallelHeads
from edgeomni.runtimes.common.turn_state import Hidden, TurnState, check_audio_row, check_start, taken
from edgeomni.runtimes.ggml.heads import Heads
from edgeomni.runtimes.llamacpp.body import BATCH, Body, Context, Stack
from edgeomni.runtimes.llamacpp.files import check_same_model, read_heads, read_stack
from edgeomni.runtimes.llamacpp.library import has_vnni, use_device
from edgeomni.spec import OmniSpec

_SPARE_CONTEXTS = 4
_REPACKED = ("q4_0", "q4_k", "q5_k", "q6_k")
"""Kinds whose weights ggml lays out anew for its kernels when it loads them (ggml-cpu/repack.cpp)."""
_ALWAYS_TOGETHER = ("fp32", "fp16", "bf16", "q4_0")
"""Kinds of a body whose two rows are faster in one call everywhere. Of the others ggml's kernel for one column gains so
much by VNNI, and the one for two columns so little, that there two calls are faster (q8_0 on Zen 5: 2 x 12.2 against
32.9 ms; on Zen 3, without VNNI: 2 x 38 against 59)."""

LlamaState = TurnState[tuple[Context, ...]]


class LlamaLanguageModel(ParallelHeads[Hidden]):
    """Fulfils components.LanguageModel. What a turn changes is in its state.

    `path` is the bundle's directory. Raises BundleError for files that are not this model's, EngineError where
    llama-cpp-python is missing, has no such device, or cannot load them.
    """

    def __init__(
        self, path: Path, component: Component, spec: OmniSpec, threads: int | None, device: str = "cpu"
    ) -> None:
        use_device(device)  # refuses one that is not there, before anything is loaded
        threads = threads or os.cpu_count() or 1
        kinds = {parse(scheme).kind for name, scheme in component.scheme.items() if name.startswith(("body.", "tts."))}
        self._spec, self._context, self.threads = spec, int(component.meta["context"]), threads
        self._kv_type = str(component.meta["kv"])
        always = parse(component.scheme["body.linear"]).kind in _ALWAYS_TOGETHER
        self._together = always or device != "cpu" or not has_vnni()
        files = {role: path / graph.path for role, graph in component.graphs.items()}
        layers = {"body": spec.body.layers} | ({"tts": spec.tts_layers} if spec.tts_layers else {})
        readers = {files[role]: read_stack(files[role], spec, count) for role, count in layers.items()}
        heads = read_heads(files["heads"], spec)
        check_same_model({**readers, files["heads"]: heads})
        repacks = bool(kinds.intersection(_REPACKED))
        self._heads = Heads(heads, spec, threads, device)
        self._bodies = tuple(
            Body(Stack(files[role], spec.body.width, count, repacks), threads, device) for role, count in layers.items()
        )
        self._contexts, self._spare = set[tuple[Context, ...]](), deque[tuple[Context, ...]]()
        self._frame_threads = threads

    def start(self, rows: int, max_frames: int) -> LlamaState:
        """An empty state, its contexts reused from an earlier turn where they are large enough."""
        check_start(rows, max_frames, self._context, BATCH)
        contexts = self._reused(rows, max_frames) or self._new(rows, max_frames)
        state = LlamaState(contexts, max_frames, rows)
        weakref.finalize(state, self._given_back, contexts).atexit = False
        return state

    def forward(
        self, ids: I32, features: Sequence[Features], state: LlamaState, interrupt: Interrupt | None = None
    ) -> Hidden:
        """See components.LanguageModel. Raises EngineError for a full state and for ids or features that do not fit.

        Setting `interrupt` from another thread ends the call in the middle of a frame, with Interrupted.
        """
        state.check_ids(ids)
        embeds = self.embed(ids, features)
        for context in state.caches:
            context.set_threads(self._frame_threads)
        text, un_normed = state.caches[0].append(embeds, state.length, interrupt, together=self._together)
        audio = text
        if un_normed is not None:
            audio, _ = state.caches[1].append(un_normed[:1], state.length, interrupt, together=True)
        state.length += ids.shape[2]
        return Hidden(text, audio)

    def fork(self, state: LlamaState) -> None:
        state.caches[0].copy_row(0, state.next_row())
        state.rows += 1

    def drop(self, state: LlamaState, row: int) -> None:
        state.check_last(row)
        state.caches[0].forget_row(row)
        state.rows -= 1

    def text_logits(self, hidden: Hidden, row: int) -> F32:
        return self._heads.text_logits(hidden.text[row])

    def audio_logits(self, hidden: Hidden, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab]. With a TTS adapter only row 0 has audio: raises EngineError for others."""
        check_audio_row(row, len(hidden.audio))
        return self._heads.audio_logits(hidden.audio[row])

    def set_threads(self, threads: int) -> None:
        """From the next call on, single frames and heads are computed with so many threads; prompts keep all.

        What is computed does not depend on the number. Not to be called while a call is under way.
        """
        if threads < 1:
            raise EngineError(f"a number of threads must be at least 1, not {threads}")
        if threads != self._frame_threads:
            self._frame_threads = threads
            self._heads.set_threads(threads)

    def close(self) -> None:
        """Frees the model and every context; a state of before is of no more use."""
        self._spare.clear()
        while self._contexts:
            for context in self._contexts.pop():
                context.close()
        self._heads.close()
        for body in self._bodies:
            body.close()

    def embed(self, ids: I32, features: Sequence[Features] = ()) -> F32:
        """ids [rows, K+1, t] -> [rows, t, D]: the mean over the K+1 streams, K of them replaced by a feature."""
        audio, text = self._heads.embedding(ids)
        return mean_of_streams(audio, text, ids.shape[1], features)

    def _reused(self, rows: int, frames: int) -> tuple[Context, ...] | None:
        contexts = taken(self._spare, lambda spare: spare[0].rows >= rows and spare[0].frames >= frames)
        for context in contexts or ():
            context.clear()
        return contexts

    def _new(self, rows: int, frames: int) -> tuple[Context, ...]:
        if any(not body.model for body in self._bodies):
            raise EngineError("this LLM is closed; open it again")
        body, *tts = self._bodies
        contexts = (
            Context(body, rows, frames, self._kv_type, un_normed=bool(tts)),
            *(Context(other, 1, frames, self._kv_type) for other in tts),
        )
        self._contexts.add(contexts)
        return contexts

    def _given_back(self, contexts: tuple[Context, ...]) -> None:
        if contexts not in self._contexts:  # closed meanwhile
            return
        self._spare.append(contexts)
        if len(self._spare) > _SPARE_CONTEXTS:
            oldest = self._spare.popleft()
            self._contexts.discard(oldest)
            for context in oldest:
                context.close()
