"""A second, plain implementation of the published forward (gpt-omni/mini-omni, litgpt/model.py), straight from
LitGPT's tensors, for layouts of which no golden outputs exist: untied heads, other adapters, TTS adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def logits(state: dict[str, Tensor], config: dict[str, Any], ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """ids [1, K+1, T], Whisper features [F, width] -> text [T, text_vocab], audio [T, K * audio_vocab]."""
    table = state["transformer.wte.weight"]
    parts = [table[row] for row in ids[0]]
    adapted = _adapter(state, config, features)
    for part in parts[:-1]:
        part[1 : 1 + len(adapted)] = adapted
    x = sum(parts) / len(parts)
    for i in range(config["n_layer"]):
        x = _block(state, f"transformer.h.{i}.", config, x)
    joint = F.linear(_norm(x, state["transformer.ln_f.weight"]), state.get("lm_head.weight", table))
    text_vocab, audio_rows = config["text_vocab_size"], config["cat_audio_vocab_size"]
    if not config["post_adapter"]:
        return joint[:, :text_vocab], joint[:, text_vocab : text_vocab + audio_rows]
    for i in range(config["post_adapter_layers"]):
        x = _block(state, f"transformer.post_adapter.{i}.", config, x)
    normed = _norm(x, state["transformer.post_adapter_audio_ln.weight"])
    return joint[:, :text_vocab], F.linear(normed, state["transformer.post_adapter_audio_lm_head.weight"])


def _adapter(state: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    if config["asr_adapter"] == "mlp":
        return F.linear(x, state["whisper_adapter.weight"], state["whisper_adapter.bias"])
    gate = F.silu(F.linear(x, state["whisper_adapter.fc_1.weight"]))
    return F.linear(gate * F.linear(x, state["whisper_adapter.fc_2.weight"]), state["whisper_adapter.proj.weight"])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def _rope(x: Tensor, base: float) -> Tensor:
    frames, size = x.shape[-2:]
    angles = torch.outer(torch.arange(frames), 1 / base ** (torch.arange(0, size, 2) / size)).repeat(1, 2)
    turned = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1)
    return x * angles.cos() + turned * angles.sin()


def _block(state: dict[str, Tensor], prefix: str, config: dict[str, Any], x: Tensor) -> Tensor:
    heads, groups, size = config["n_head"], config["n_query_groups"], config["head_size"]
    fused = F.linear(
        _norm(x, state[prefix + "norm_1.weight"]),
        state[prefix + "attn.attn.weight"],
        state.get(prefix + "attn.attn.bias"),
    )
    per = heads // groups
    qkv = fused.view(len(x), groups, per + 2, size).permute(1, 2, 0, 3)
    out = []
    for group in qkv:
        key, value = _rope(group[per], config["rope_base"]), group[per + 1]
        for query in group[:per]:
            scores = _rope(query, config["rope_base"]) @ key.T / size**0.5
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            out.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value)
    x = x + F.linear(torch.cat(out, -1), state[prefix + "attn.proj.weight"])
    normed = _norm(x, state[prefix + "norm_2.weight"])
    gate = F.silu(F.linear(normed, state[prefix + "mlp.fc_1.weight"])) * F.linear(
        normed, state[prefix + "mlp.fc_2.weight"]
    )
    return x + F.linear(gate, state[prefix + "mlp.proj.weight"])
