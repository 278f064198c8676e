"""Decoder bodies: BodySpec <-> transformers config, the un-normed forward over their layers, the KV cache.

Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388) and Llama (arXiv 2302.13971) differ in biases and q/k norms
only, so that one forward over `layers` serves all of them. Mistral (arXiv 2310.06825) is Llama but for its sliding
window: within the window both attend to everything, and the context never exceeds it (`max_context`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from ..errors import CheckpointError, SpecError
from ..spec import BodySpec

LLMS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
"""What an LLM's configuration calls its type -> transformers' class of it."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class KVCache:
    """Keys and values of `rows` rows, room for `max_frames` frames, allocated once.

    One pair of buffers [rows, kv_heads, max_frames, head_dim] per layer, TTS layers after the body's. A forward
    writes the frames behind `length`; `advance` makes them count, once all layers have seen them.
    """

    def __init__(
        self,
        body: BodySpec,
        layers: int,
        rows: int,
        max_frames: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (rows, body.kv_heads, max_frames, body.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.max_frames = max_frames
        self.length: int = 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: key, value [B, kv_heads, T, head_dim] -> all frames so far."""
        rows, _, frames, _ = key.shape
        end = self.length + frames
        self.keys[layer_idx][:rows, :, self.length : end] = key
        self.values[layer_idx][:rows, :, self.length : end] = value
        return self.keys[layer_idx][:rows, :, :end], self.values[layer_idx][:rows, :, :end]

    def advance(self, frames: int) -> None:
        self.length += frames

    def copy_row(self, source: int, target: int) -> None:
        for buffer in (*self.keys, *self.values):
            buffer[target, :, : self.length] = buffer[source, :, : self.length]


def run_layers(layers: nn.ModuleList, rotary: nn.Module, x: Tensor, cache: KVCache | None) -> Tensor:
    """Decoder layers without the final norm: x [B, T, D] -> [B, T, D], causal, after the frames in `cache`."""
    past, frames = cache.length if cache else 0, x.shape[1]
    positions = torch.arange(past, past + frames, device=x.device)[None]
    rope = rotary(x, positions)
    mask = None
    if past and frames > 1:  # SDPA's own causal mask is aligned to the first key, so it serves only past == 0
        mask = torch.ones(frames, past + frames, dtype=torch.bool, device=x.device).tril(past)[None, None]
    for layer in layers:
        x = layer(x, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rope)
    return x


def build(body: BodySpec, context: int, extra_layers: int = 0) -> nn.Module:
    """A transformers body without its embedding, with `extra_layers` more layers for the TTS adapter."""
    model = AutoModel.from_config(config_of(body, context, body.layers + extra_layers), dtype=torch.float32)
    del model.embed_tokens  # fed by inputs_embeds only
    return model


def rebuild_rotary(model: nn.Module) -> None:
    """Rotary frequencies are no part of a state dict: compute them where the model was built on `meta`."""
    model.rotary_emb = type(model.rotary_emb)(model.config)  # type: ignore[operator]


def config_of(body: BodySpec, context: int, layers: int) -> PreTrainedConfig:
    """transformers config of `layers` layers of that body.

    Raises SpecError for biases that the type lacks, and for a rope_theta or norm_eps that is no usable number.
    """
    for name, value in (("rope_theta", body.rope_theta), ("norm_eps", body.norm_eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise SpecError(f"body.{name} must be a finite number above 0, not {value!r}")
    rope = {"rope_type": "default", **(body.rope_scaling or {}), "rope_theta": body.rope_theta}
    shared: dict[str, Any] = {
        "vocab_size": 1,
        "hidden_size": body.width,
        "intermediate_size": body.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": body.heads,
        "num_key_value_heads": body.kv_heads,
        "head_dim": body.head_dim,
        "max_position_embeddings": max(context, rope.get("original_max_position_embeddings", 0)),
        "rms_norm_eps": body.norm_eps,
        "rope_parameters": rope,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    biases = (body.qkv_bias, body.o_bias, body.mlp_bias)
    allowed = {
        "qwen2": biases == (True, False, False) and not body.qk_norm,
        "qwen3": body.qkv_bias == body.o_bias and not body.mlp_bias and body.qk_norm,
        "llama": body.qkv_bias == body.o_bias and not body.qk_norm,
    }
    if not allowed[body.kind]:
        raise SpecError(
            f"body.kind {body.kind!r} cannot have qkv_bias {body.qkv_bias}, o_bias {body.o_bias}, "
            f"mlp_bias {body.mlp_bias}, qk_norm {body.qk_norm}"
        )
    if body.kind == "qwen2":
        return Qwen2Config(**shared)
    if body.kind == "qwen3":
        return Qwen3Config(**shared, attention_bias=body.qkv_bias)
    return LlamaConfig(**shared, attention_bias=body.qkv_bias, mlp_bias=body.mlp_bias)


def spec_of(config: PreTrainedConfig, where: str) -> BodySpec:
    """BodySpec of a transformers config; Mistral's is Llama's. Raises CheckpointError for what is not supported."""
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    if kind not in ("qwen2", "qwen3", "llama"):
        raise CheckpointError(f"{where}: body type {kind!r}; supported are qwen2, qwen3, llama and mistral")
    if config.hidden_act != "silu":
        raise CheckpointError(f"{where}: activation {config.hidden_act!r}; supported is silu")
    bias = kind == "qwen2" or bool(getattr(config, "attention_bias", False))
    theta, scaling = _rope_of(config, where)
    return BodySpec(
        kind=kind,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        ffn=config.intermediate_size,
        rope_theta=theta,
        rope_scaling=scaling,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        qkv_bias=bias,
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
    )


def max_context(config: PreTrainedConfig) -> int:
    """Frames up to which every layer attends to all of them: its positions, or its sliding window if that is shorter.

    Mistral slides in all layers as soon as it has a window. Qwen2 and Qwen3 slide in the layers that `layer_types`
    names, which transformers derives from use_sliding_window, sliding_window and max_window_layers.
    Raises CheckpointError for a kind of attention that is not known.
    """
    positions, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise CheckpointError(f"attention of type {unknown[0]!r}; supported are full_attention and sliding_attention")
    slides = window is not None and ("sliding_attention" in kinds or config.model_type == "mistral")
    return min(positions, window) if slides else positions


def _rope_of(config: PreTrainedConfig, where: str) -> tuple[float, dict[str, Any] | None]:
    rope = dict(config.rope_parameters)
    theta = float(rope.pop("rope_theta"))
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":  # changes nothing within max_position_embeddings, which bounds our context
        kind = "default"
    if kind not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1) not in (1, None):
        raise CheckpointError(f"{where}: rotary embedding {rope}; supported are {', '.join(_ROPE_TYPES)}, not partial")
    if kind == "default":
        return theta, None
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return theta, rope
