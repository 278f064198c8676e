"""The TTS adapter (`post_adapter` of gpt-omni/mini-omni, litgpt/model.py): more blocks for the audio heads only."""

from __future__ import annotations

from torch import Tensor, nn

from .bodies import KVCache, run_layers


class TtsAdapter(nn.Module):
    """Blocks of the body's own class on the body's un-normed output, then their own final norm."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm

    def forward(self, x: Tensor, rotary: nn.Module, cache: KVCache | None = None) -> Tensor:
        """Body output [B, T, D], un-normed -> what the audio heads read [B, T, D]."""
        return self.norm(run_layers(self.layers, rotary, x, cache))
