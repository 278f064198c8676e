"""GGUF files as llama.cpp's converter writes them, from tiny models that transformers saved; and llama.cpp's answers.

The names and the order of Llama's rotary pairs are spelled out here by hand, so that they do not come from the tables
that the product uses.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edgeomni.runtimes.llamacpp import library

OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OF_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        stem, _, end = name.rpartition(".")
        return f"{OF_MODEL[stem]}.{end}"
    _, _, number, rest = name.split(".", 3)
    stem, _, end = rest.rpartition(".")
    return f"blk.{number}.{OF_BLOCK[stem]}.{end}"


def pairs_side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row j of a head's first half is followed by row j of its second half."""
    size = len(rows) // heads
    order = [h * size + half * size // 2 + j for h in range(heads) for j in range(size // 2) for half in (0, 1)]
    return rows[order]


def tensors_of(directory: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The model in `directory`, and its tensors as GGUF has them."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    config, found = model.config, dict[str, np.ndarray]()
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.float().numpy()
        if config.model_type in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            rows = pairs_side_by_side(rows, heads)
        found[gguf_name(name)] = np.ascontiguousarray(rows)
    return model, found


def write(directory: Path, path: Path, kind: str = "F32", **changed: Any) -> Any:
    """Writes the model in `directory` to `path`, its tables in GGML's type `kind`; returns the model of transformers.

    `changed`: metadata by key ("." as "__"), None to leave one out, and `tensors`: a function that changes them.
    """
    model, tensors = tensors_of(directory)
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    facts: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "none",
        "general.license": "mit",
    }
    if rope["rope_type"] in ("linear", "yarn"):
        facts |= {f"{arch}.rope.scaling.type": rope["rope_type"], f"{arch}.rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        facts[f"{arch}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(rope, head_dim)
    facts |= {key.replace("__", "."): value for key, value in changed.items() if key not in ("tensors", "arch")}
    if "tensors" in changed:
        changed["tensors"](tensors)
    writer = gguf.GGUFWriter(path, changed.get("arch", arch))
    for key, value in facts.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            adders: dict[type, Any] = {
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                bool: writer.add_bool,
            }
            adders[type(value)](key, value)
    for name, rows in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if rows.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(rows, stored), raw_dtype=stored)
    finish(writer)
    return model


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """As llama.cpp's converter computes them, one after another (conversion of Llama 3.1)."""
    factors = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if length < high:
            factors.append(1.0)
        elif length > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def llama_cpp_logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's own logits [T, vocab] of these ids."""
    llama_cpp = library.llama()  # its messages go to logging, in every test of a process alike
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 256, 256, 1, 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for n, id_ in enumerate(ids):
        batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = id_, n, 1, 1
        batch.seq_id[n][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, n), (vocab,)).copy() for n in range(len(ids))]
    llama_cpp.llama_batch_free(batch), llama_cpp.llama_free(context), llama_cpp.llama_model_free(model)
    return np.stack(rows)


def text_logits(model: Any, ids: list[int]) -> np.ndarray:
    """An OmniModel's text logits [T, text_vocab] of a plain text: its rows of the embedding, no audio."""
    with torch.inference_mode():
        embeds = model.embedding.weight[torch.tensor(ids)][None]
        logits: np.ndarray = model.text_logits(model.hidden(embeds)[0])[0].numpy()
    return logits
