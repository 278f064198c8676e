"""The speech encoder of an OmniModel, with its adapter, on torch."""

from __future__ import annotations

import torch

from edgeomni.arrays import F32
from edgeomni.model import OmniModel
from edgeomni.runtimes.torch.llm import to_numpy


class TorchEncoder:
    """Fulfils components.Encoder."""

    def __init__(self, model: OmniModel) -> None:
        self._model = model

    def encode(self, mel: F32, wanted: int | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> features [t // 2, D], or the first `wanted` of them."""
        with torch.inference_mode():
            return to_numpy(self._model.encode(torch.from_numpy(mel)[None].to(self._model.device))[0, :wanted])
