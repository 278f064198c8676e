"""The torch reference runtime: an OmniModel behind the three protocols, in float32, on the CPU or a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeomni.arrays import F32, I32
from edgeomni.components import Components
from edgeomni.errors import EngineError
from edgeomni.hardware import check_threads
from edgeomni.model import KVCache, OmniModel
from edgeomni.runtimes.torch.codec import TorchCodec


class TorchEncoder:
    """Encoder protocol: speech encoder and adapter."""

    def __init__(self, model: OmniModel) -> None:
        self._model = model

    def encode(self, mel: F32, wanted: int | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> features [t // 2, D], or the first `wanted` of them."""
        with torch.inference_mode():
            return _numpy(self._model.encode(torch.from_numpy(mel)[None].to(self._model.device))[0, :wanted])


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


class TorchLanguageModel:
    """LanguageModel protocol. With a TTS adapter its blocks run on row 0 only, which has the audio."""

    def __init__(self, model: OmniModel) -> None:
        self._model = model

    def start(self, rows: int, max_frames: int) -> TorchState:
        return TorchState(self._model.new_cache(rows, max_frames), rows)

    def forward(self, ids: I32, features: F32 | None, state: TorchState, feature_start: int = 1) -> TorchHidden:
        """ids [active rows, K+1, t] -> what the heads read of the last position. Raises EngineError when full."""
        model, cache, frames = self._model, state.cache, ids.shape[-1]
        if len(ids) != state.rows:
            raise EngineError(f"{len(ids)} rows of ids for a state with {state.rows} active")
        if cache.length + frames > cache.max_frames:
            raise EngineError(f"{cache.length} + {frames} frames exceed the {cache.max_frames} of this state")
        with torch.inference_mode():
            given = None if features is None else torch.from_numpy(features).to(model.device)
            out = model.body_out(model.embed(torch.from_numpy(ids).to(model.device), given, feature_start), cache)
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
            return _numpy(self._model.text_logits(hidden.text[row]))

    def audio_logits(self, hidden: TorchHidden, row: int) -> F32:
        """[K, audio_vocab] of that row."""
        with torch.inference_mode():
            return _numpy(self._model.audio_logits(hidden.audio[row]))

    def close(self) -> None:
        """Nothing is held beyond the model."""


def load(model: OmniModel, device: str = "cpu", threads: int | None = None) -> Components:
    """Components that run `model` with torch; `threads` is torch's own, process-wide setting.

    Raises EngineError where `device` is not there, UsageError for a number of threads out of range.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError("--device cuda: this torch sees no CUDA device; install a CUDA build of torch, or use cpu")
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    model = model.to(device).eval()
    return Components(TorchEncoder(model), TorchLanguageModel(model), TorchCodec(model))


def _numpy(tensor: Tensor) -> F32:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
