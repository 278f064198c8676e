"""The speech encoder of an OmniModel, with its adapter, on torch."""

from __future__ import annotations

import torch

from edgeomni.arrays import F32
from edgeomni.interrupt import Interrupt
from edgeomni.model import OmniModel
from edgeomni.runtimes.torch.llm import to_numpy


class TorchEncoder:
    """Fulfils components.Encoder."""

    def __init__(self, model: OmniModel) -> None:
        self._model = model

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> features [t // 2, D], or the first `wanted` of them.

        torch cannot be stopped in the middle, so that `interrupt` is looked at before and after the run only.
        """
        interrupt = interrupt or Interrupt()
        interrupt.check()
        with torch.inference_mode():
            features = to_numpy(self._model.encode(torch.from_numpy(mel)[None].to(self._model.device))[0, :wanted])
        interrupt.check()
        return features

    def close(self) -> None:
        """Nothing is held beyond the model."""
