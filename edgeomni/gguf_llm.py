"""What the LLM's GGUF files hold, worked out from the spec: the exporter writes it, and the runtime demands it.

body.gguf (and tts.gguf, the blocks of a TTS adapter) is a model that llama.cpp loads: its metadata keys are those of
llama.cpp (src/llama-arch.cpp of ggml-org/llama.cpp). heads.gguf is ours: the heads' rows, and the embedding's where no
head shares them. All files of one model hold the same `MODEL_ID`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import UsageError
from .spec import BodySpec, OmniSpec

MODEL_ID = "edgeomni.model.id"
HEADS_ARCHITECTURE = "edgeomni-heads"
NO_EMBEDDING_ROWS = 32
"""Rows of zeros: llama.cpp asks for an embedding, and we give it embeddings from outside."""
ROPE_FREQS = "rope_freqs.weight"
Fact = int | float | str
Shape = tuple[int, ...]
_BIASES = {"qwen2": ("qkv",), "qwen3": ("qkv",), "llama": ("qkv", "o", "mlp")}
"""Biases of linear layers that llama.cpp's graph of an architecture adds."""


def check_body(spec: OmniSpec) -> None:
    """Raises UsageError for a body that llama.cpp computes otherwise, or not at all."""
    body, remedy = spec.body, "export the LLM to onnx (--llm onnx:int4)"
    if body.kind == "qwen2" and body.heads * body.head_dim != body.width:
        raise UsageError(
            f"llama.cpp's qwen2 has heads as wide together as the body, not {body.heads} of {body.head_dim} in "
            f"{body.width}; {remedy}"
        )
    if body.head_dim % 2:
        raise UsageError(f"llama.cpp rotates pairs, and heads of {body.head_dim} are no whole pairs; {remedy}")
    biases = {"qkv": body.qkv_bias, "o": body.o_bias, "mlp": body.mlp_bias}
    if odd := [name for name, there in biases.items() if there and name not in _BIASES[body.kind]]:
        raise UsageError(f"llama.cpp's {body.kind} has no bias in {', '.join(odd)}; {remedy}")
    kind = rope_type(body)
    if kind not in ("default", "linear", "yarn") and (kind, body.kind) != ("llama3", "llama"):
        raise UsageError(f"llama.cpp's {body.kind} has no rotary scaling {kind!r}; {remedy}")


def rope_type(body: BodySpec) -> str:
    return str((body.rope_scaling or {}).get("rope_type", "default"))


def body_facts(spec: OmniSpec, layers: int) -> dict[str, Fact]:
    """Metadata of a stack of `layers` blocks that llama.cpp builds its graph from; floats are stored as float32."""
    body = spec.body
    return {
        "tokenizer.ggml.model": "none",
        **{
            f"{body.kind}.{key}": value
            for key, value in {
                "vocab_size": NO_EMBEDDING_ROWS,
                "context_length": spec.context,
                "embedding_length": body.width,
                "block_count": layers,
                "feed_forward_length": body.ffn,
                "attention.head_count": body.heads,
                "attention.head_count_kv": body.kv_heads,
                "attention.key_length": body.head_dim,
                "attention.value_length": body.head_dim,
                "attention.layer_norm_rms_epsilon": float(body.norm_eps),
                "rope.dimension_count": body.head_dim,
                "rope.freq_base": float(body.rope_theta),
                **_scaling(body.rope_scaling or {}),
            }.items()
        },
    }


def _scaling(rope: Mapping[str, Any]) -> dict[str, Fact]:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind != "yarn":
        return {}
    factor = float(rope["factor"])
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.attn_factor": yarn_magnitude(rope) / _usual_magnitude(factor),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }


def yarn_magnitude(rope: Mapping[str, Any]) -> float:
    """What YaRN (arXiv 2309.00071, eq. 22) multiplies queries and keys with, as transformers reads its parameters."""
    factor = float(rope["factor"])
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _usual_magnitude(factor, rope["mscale"]) / _usual_magnitude(factor, rope["mscale_all_dim"])
    return _usual_magnitude(factor)


def _usual_magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def layout_facts(spec: OmniSpec) -> dict[str, int]:
    """Metadata of every file: which ids its rows belong to."""
    layout = spec.layout
    names = ("text_vocab", "audio_vocab", "codebook_size", "streams", "text_specials")
    return {f"edgeomni.layout.{name}": getattr(layout, name) for name in names}


def linear_shapes(body: BodySpec) -> dict[str, Shape]:
    """The linear layers of a block by their GGUF names, [outputs, inputs]."""
    width, q, kv = body.width, body.heads * body.head_dim, body.kv_heads * body.head_dim
    return {
        "attn_q": (q, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, q),
        "ffn_gate": (body.ffn, width),
        "ffn_up": (body.ffn, width),
        "ffn_down": (width, body.ffn),
    }


def float_shapes(body: BodySpec, layers: int) -> dict[str, Shape]:
    """The tensors of a stack of blocks that are stored as float32: gains, biases, the rows of no embedding."""
    found: dict[str, Shape] = {
        "token_embd.weight": (NO_EMBEDDING_ROWS, body.width),
        "output_norm.weight": (body.width,),
    }
    if rope_type(body) == "llama3":
        found[ROPE_FREQS] = (body.head_dim // 2,)
    biased = ["attn_q", "attn_k", "attn_v"] * body.qkv_bias + ["attn_output"] * body.o_bias
    biased += ["ffn_gate", "ffn_up", "ffn_down"] * body.mlp_bias
    gains = {"attn_norm": body.width, "ffn_norm": body.width}
    gains |= {"attn_q_norm": body.head_dim, "attn_k_norm": body.head_dim} if body.qk_norm else {}
    shapes = linear_shapes(body)
    for i in range(layers):
        found |= {f"blk.{i}.{name}.bias": shapes[name][:1] for name in biased}
        found |= {f"blk.{i}.{name}.weight": (size,) for name, size in gains.items()}
    return found


def head_shapes(spec: OmniSpec) -> dict[str, Shape]:
    """The tensors of heads.gguf. An embedding's rows are there only where no head shares them."""
    layout, width = spec.layout, spec.body.width
    text, audio = (layout.text_vocab, width), (layout.streams * layout.audio_vocab, width)
    found: dict[str, Shape] = {"text_head.weight": text, "audio_head.weight": audio}
    if not spec.tied:
        found["text_embedding.weight"] = text
    if not spec.tied or spec.tts_layers:
        found["audio_embedding.weight"] = audio
    return found
