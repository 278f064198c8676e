"""Speech encoder (Whisper, arXiv 2212.04356) for windows of any length up to its own, and the adapters."""

from __future__ import annotations

import re
import reprlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..errors import AudioError, CheckpointError
from ..spec import AdapterSpec, EncoderSpec, FrontEndSpec
from .tensors import state_of

# transformers names -> openai-whisper names (openai/whisper, whisper/model.py)
_OPENAI_NAMES = (
    (r"^layers\.", "blocks."),
    (r"\.self_attn\.q_proj\.", ".attn.query."),
    (r"\.self_attn\.k_proj\.", ".attn.key."),
    (r"\.self_attn\.v_proj\.", ".attn.value."),
    (r"\.self_attn\.out_proj\.", ".attn.out."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"^layer_norm\.", "ln_post."),
    (r"^embed_positions\.weight$", "positional_embedding"),
)


def build(encoder: EncoderSpec, n_mels: int) -> WhisperEncoder:
    return WhisperEncoder(
        WhisperConfig(
            d_model=encoder.width,
            encoder_layers=encoder.layers,
            encoder_attention_heads=encoder.heads,
            encoder_ffn_dim=encoder.ffn,
            max_source_positions=encoder.context,
            num_mel_bins=n_mels,
        )
    )


def encode(encoder: WhisperEncoder, mel: Tensor) -> Tensor:
    """mel [B, n_mels, t] -> [B, t // 2, width], with the first t // 2 positions.

    transformers' own forward accepts only the full window. Raises AudioError for an odd or too long t.
    """
    frames, longest = mel.shape[-1], 2 * encoder.config.max_source_positions
    if frames % 2 or not 0 < frames <= longest:
        raise AudioError(f"{frames} mel frames; the encoder takes an even number from 2 to {longest}")
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)


class SwigluAdapter(nn.Module):
    """proj(silu(fc_1 x) * fc_2 x): `whisperMLP` of gpt-omni/mini-omni, litgpt/model.py."""

    def __init__(self, width: int, hidden: int, out: int, bias: bool) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(width, hidden, bias=bias)
        self.fc_2 = nn.Linear(width, hidden, bias=bias)
        self.proj = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class LinearAdapter(nn.Module):
    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def build_adapter(adapter: AdapterSpec, width: int, out: int) -> nn.Module:
    if adapter.kind == "swiglu":
        return SwigluAdapter(width, adapter.hidden, out, adapter.bias)
    return LinearAdapter(width, out, adapter.bias)


def names(encoder: EncoderSpec) -> list[str]:
    """The names of the encoder's tensors (transformers', without prefix), for any number of mel bands."""
    with torch.device("meta"):
        return list(build(encoder, 1).state_dict())


def openai_name(name: str) -> str:
    """`layers.0.self_attn.q_proj.weight` -> `encoder.blocks.0.attn.query.weight`."""
    for pattern, replacement in _OPENAI_NAMES:
        name = re.sub(pattern, replacement, name)
    return f"encoder.{name}"


def from_openai(checkpoint: Any, where: str) -> tuple[EncoderSpec, int, dict[str, Tensor]]:
    """An openai-whisper checkpoint -> encoder spec, mel bands, the encoder's tensors under their own names."""
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    dims, state = parts.get("dims"), parts.get("model_state_dict")
    if not isinstance(dims, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{where}: no openai-whisper checkpoint (it needs 'dims' and 'model_state_dict')")
    state = state_of(state, where)
    if wrong := [f"{name} {reprlib.repr(n)}" for name, n in dims.items() if type(n) is not int]:
        raise CheckpointError(f"{where}: its 'dims' hold no whole numbers: {', '.join(wrong)}")
    try:
        width = dims["n_audio_state"]
        spec = EncoderSpec(dims["n_audio_layer"], width, dims["n_audio_head"], 4 * width, dims["n_audio_ctx"])
        n_mels = dims["n_mels"]
    except KeyError as exc:
        raise CheckpointError(f"{where}: its 'dims' lack {exc}; download the checkpoint again") from exc
    # The text decoder is not used.
    return spec, n_mels, {name: t for name, t in state.items() if name.startswith("encoder.")}


def from_transformers(config: WhisperConfig) -> tuple[EncoderSpec, int]:
    """Encoder spec and mel bands of a transformers Whisper config."""
    spec = EncoderSpec(
        config.encoder_layers,
        config.d_model,
        config.encoder_attention_heads,
        config.encoder_ffn_dim,
        config.max_source_positions,
    )
    return spec, config.num_mel_bins


def front_end(encoder: EncoderSpec, n_mels: int) -> FrontEndSpec:
    """Whisper's front end: two mel frames of 10 ms per encoder position."""
    default = FrontEndSpec()
    return FrontEndSpec(n_mels=n_mels, window_s=encoder.context * 2 * default.hop // default.sample_rate)
