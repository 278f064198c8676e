"""The LLM of an OmniModel on torch, in float32: embedding, body, TTS adapter and heads behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeomni.arrays import F32, I32, I64
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.model import KVCache, OmniModel
from edgeomni.runtimes.common.parallel_heads import ParallelHeads


@dataclass
class TorchState:
    """One turn's KV cache and how many of its rows are active."""

    cache: KVCache
    room: int
    rows: int = 1

    @property
    def length(self) -> int:
        """Frames cached so far."""
        return self.cache.length


@dataclass(frozen=True)
class TorchHidden:
    """Last position, normed: `text` [rows, D]; `audio` [rows, D], or [1, D] of row 0 with a TTS adapter."""

    text: Tensor
    audio: Tensor


class TorchLanguageModel(ParallelHeads[TorchHidden]):
    """Fulfils components.LanguageModel. The blocks of a TTS adapter run on row 0 only, which has the audio."""

    def __init__(self, model: OmniModel) -> None:
        self._model = model

    def start(self, rows: int, max_frames: int) -> TorchState:
        return TorchState(self._model.new_cache(rows, max_frames), rows)

    def forward(
        self, ids: I32, features: Sequence[Features], state: TorchState, interrupt: Interrupt | None = None
    ) -> TorchHidden:
        """See components.LanguageModel. torch finishes a call under way, whatever `interrupt` says meanwhile.

        Raises EngineError for a full state and for ids or features that do not fit.
        """
        model, cache, frames = self._model, state.cache, ids.shape[-1]
        if len(ids) != state.rows:
            raise EngineError(f"{len(ids)} rows of ids for a state with {state.rows} active")
        if cache.length + frames > cache.max_frames:
            raise EngineError(f"{cache.length} + {frames} frames exceed the {cache.max_frames} of this state")
        _check_fit(ids, features, model.spec.layout.joint_vocab)
        with torch.inference_mode():
            given = [(f.start, torch.from_numpy(f.values).to(model.device)) for f in features]
            out = model.body_out(model.embed(torch.from_numpy(ids).to(model.device), given), cache)
            text = model.body.norm(out[:, -1])
            audio = text if model.tts is None else model.tts_out(out[:1], cache)[:, -1]
        cache.advance(frames)
        return TorchHidden(text, audio)

    def fork(self, state: TorchState) -> None:
        """One prefilled row -> two active rows, KV copied."""
        if state.rows != 1 or state.room < 2:
            raise EngineError(f"fork needs one active row and room for two, not {state.rows} of {state.room}")
        state.cache.copy_row(0, 1)
        state.rows = 2

    def drop(self, state: TorchState, row: int) -> None:
        """The last active row is no longer wanted."""
        if row != state.rows - 1 or row == 0:
            raise EngineError(f"row {row} cannot be dropped of {state.rows}: only the last one, and not row 0")
        state.rows -= 1

    def text_logits(self, hidden: TorchHidden, row: int) -> F32:
        """[text_vocab] of that row."""
        with torch.inference_mode():
            return to_numpy(self._model.text_logits(hidden.text[row]))

    def audio_logits(self, hidden: TorchHidden, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab] of that row."""
        with torch.inference_mode():
            return to_numpy(self._model.audio_logits(hidden.audio[row]))

    def close(self) -> None:
        """Nothing is held beyond the model."""


def _check_fit(ids: I32, features: Sequence[Features], rows: int) -> None:
    """Raises EngineError where ids [B, K+1, t] have no row among the embedding's, or features no position."""
    frames = ids.shape[-1]
    if not frames:
        raise EngineError("ids of no frames: give at least one")
    if (missing := (ids < 0) | (ids >= rows)).any():
        raise EngineError(f"id {ids[missing][0]} has no row among the {rows} of the embedding; check the ids")
    for segment in features:
        if segment.start < 0 or segment.stop > frames:
            raise EngineError(
                f"features for positions {segment.start} to {segment.stop} do not fit {frames} positions of ids"
            )


def to_numpy(tensor: Tensor) -> F32:
    """A float32 array of its own, C-contiguous."""
    return np.ascontiguousarray(tensor.float().cpu().numpy())
