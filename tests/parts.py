"""Tiny parts of every kind, as transformers and SNAC save them: what `compose` is given in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MimiConfig,
    MimiModel,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    WhisperConfig,
    WhisperModel,
)

from edgeomni.model import codecs
from edgeomni.model.presets import word_tokenizer

WORDS = 90
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLMS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-untied": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen2-linear-rope": (Qwen2Config, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": (LlamaConfig, {"rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 24}),
    "mistral-window": (MistralConfig, {"sliding_window": 80}),
    "qwen2-window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 1}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN, "max_position_embeddings": 256}),
}


def whisper(directory: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    other = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 60}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    WhisperModel(WhisperConfig(**sizes, **other, **ids, num_mel_bins=40, max_source_positions=150)).save_pretrained(
        directory
    )
    return directory


def llm(directory: Path, kind: str = "qwen2") -> Path:
    torch.manual_seed(1)
    cls, extra = LLMS[kind]
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(cls(**{**sizes, **extra}))
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would prove nothing
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(word_tokenizer(WORDS))
    return directory


def snac(directory: Path, attn_window_size: int | None = None) -> Path:
    torch.manual_seed(2)
    config = {
        "sampling_rate": 24000,
        "encoder_dim": 4,
        "encoder_rates": [2, 3],
        "decoder_dim": 64,
        "decoder_rates": [3, 2],
        "attn_window_size": attn_window_size,
        "codebook_size": 50,
        "codebook_dim": 4,
        "vq_strides": [2, 1],
        "noise": True,
        "depthwise": True,
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(codecs.build({"kind": "snac", **config}).state_dict(), directory / "pytorch_model.bin")
    return directory


def mimi(directory: Path) -> Path:
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "num_filters": 4,
        "codebook_size": 32,
        "codebook_dim": 16,
        "num_quantizers": 5,
        "vector_quantization_hidden_dimension": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "upsample_groups": 32,
        "sliding_window": 7,
        "upsampling_ratios": [4, 3, 2],
        "sampling_rate": 1200,
    }
    MimiModel(MimiConfig(**sizes)).save_pretrained(directory)
    return directory
