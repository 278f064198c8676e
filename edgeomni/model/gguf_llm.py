"""An LLM in a GGUF file, as llama.cpp writes them: its configuration and tensors under transformers' names.

Architectures, keys and tensor names are those of the gguf package and of llama.cpp (src/llama-arch.cpp). All weights
are dequantized to float32; what they lost when they were quantized is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import F32
from ..errors import CheckpointError
from ..gguf_files import GgufFile, read
from . import bodies, gguf_rope
from .tensors import refuse_deeper, shapes_of, translated

ARCHITECTURES = ("qwen2", "qwen3", "llama")
"""Those of GGUF whose bodies are ours, under the same names; Mistral's files say llama."""
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
Config = dict[str, Any]


def config_of(source: str) -> Config:
    """The configuration as transformers' config.json would have it, from the file's metadata and tensor shapes.

    Raises CheckpointError for a file that cannot be read, is no whole language model, or is of an architecture or a
    rotary scaling that is not supported; EngineError where the gguf package is not installed.
    """
    file = read(Path(source), CheckpointError)
    architecture = _checked_architecture(file)
    shape = file.tensors[EMBEDDING].shape
    if len(shape) != 2:
        raise CheckpointError(f"{source}: its {EMBEDDING} is no table")
    sizes = _Sizes(file, architecture)
    heads = sizes.whole("attention.head_count")
    head_dim = sizes.whole("attention.key_length", shape[1] // heads)
    _check_supported(file, sizes, head_dim)
    return {
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": shape[0],
        "hidden_size": sizes.whole("embedding_length"),
        "intermediate_size": sizes.whole("feed_forward_length"),
        "num_hidden_layers": sizes.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": sizes.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _context(sizes),
        "rope_parameters": gguf_rope.parameters(file, architecture, head_dim, ROPE_FACTORS),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": _tied(file),
        "use_sliding_window": False,
    }


def weights(source: str, config: Config) -> dict[str, Tensor]:
    """The file's tensors, float32, under transformers' names without "model."; those with no such name under their own.

    Raises CheckpointError for tensors that cannot be dequantized, and for more layers than the file has tensors.
    """
    file = read(Path(source), CheckpointError)
    refuse_deeper(source, {"block_count": config["num_hidden_layers"]}, len(file.tensors))
    names = dict(_names(source, config))
    left_out = {ROPE_FACTORS} | ({HEAD} if config["tie_word_embeddings"] else set())
    tensors = dict[str, Tensor]()
    for name in file.tensors:
        if name not in left_out:
            ours = names.get(name, name)
            tensors[ours] = torch.from_numpy(_halves_apart(ours, file.rows(name), config))
    if not tensors[names[EMBEDDING]].any():
        raise CheckpointError(f"{source}: its embedding is all zeros, so it is no whole language model")
    return tensors


def licence(source: str) -> str | None:
    """What the file's metadata states as its licence."""
    stated = read(Path(source), CheckpointError).metadata.get("general.license")
    return stated if isinstance(stated, str) and stated.strip() else None


class _Sizes:
    """Whole numbers and others of one architecture's metadata; raises CheckpointError that names the key."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.file.get(f"{self.architecture}.{key}", int, default)
        return int(self._checked(key, value))

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.get(f"{self.architecture}.{key}", (int, float), default)
        return float(self._checked(key, value))

    def _checked(self, key: str, value: Any) -> Any:
        if value is None or not 0 < value < 2**31:
            what = "lacks" if value is None else f"says {value!r} for"
            raise CheckpointError(f"{self.file.path}: {what} {self.architecture}.{key}; convert the model again")
        return value


def _checked_architecture(file: GgufFile) -> str:
    """The architecture of a file that holds a whole language model."""
    if role := file.get("edgeomni.role", str):
        raise CheckpointError(
            f"{file.path}: is the {role} of an EdgeOmni bundle, which holds no embedding of text and is no language "
            "model by itself; give the checkpoint that it was exported from (init --from CHECKPOINT)"
        )
    kind, architecture = file.get("general.type", str, "model"), file.get("general.architecture", str, "")
    if kind != "model":
        raise CheckpointError(f"{file.path}: is of the type {kind[:40]!r}, not a model; give the model's own file")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {architecture[:40]!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    if file.get("split.count", int, 0) > 1:
        raise CheckpointError(
            f"{file.path}: is one of {file.metadata['split.count']} files; join them first with llama.cpp's "
            "`llama-gguf-split --merge FIRST OUT`"
        )
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path}: holds no {EMBEDDING}, so it is no whole language model")
    return str(architecture)


def _check_supported(file: GgufFile, sizes: _Sizes, head_dim: int) -> None:
    """Raises CheckpointError for what llama.cpp knows of these architectures and our bodies do not."""
    if file.metadata.get(f"{sizes.architecture}.expert_count"):
        raise CheckpointError(f"{file.path}: is a mixture of experts, which is not supported; give a dense model")
    values = sizes.whole("attention.value_length", head_dim)
    rotated = sizes.whole("rope.dimension_count", head_dim)
    if values != head_dim or rotated != head_dim:
        raise CheckpointError(
            f"{file.path}: heads with keys of {head_dim} numbers, values of {values} and {rotated} of them rotated; "
            "supported are heads of which all three are the same"
        )


def _context(sizes: _Sizes) -> int:
    positions = sizes.whole("context_length")
    window = sizes.file.get(f"{sizes.architecture}.attention.sliding_window", int, 0)
    return min(positions, window) if window > 0 else positions


def _tied(file: GgufFile) -> bool:
    """Without a head of its own, or with one that repeats the embedding."""
    if HEAD not in file.tensors:
        return True
    table, head = file.tensors[EMBEDDING], file.tensors[HEAD]
    return (table.shape, table.type) == (head.shape, head.type) and bool(
        np.array_equal(file.rows(EMBEDDING), file.rows(HEAD))
    )


def _names(source: str, config: Config) -> Iterator[tuple[str, str]]:
    """GGUF's name and transformers' of every tensor that this configuration has."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = MODEL_ARCH[config["model_type"].upper()]
    theirs = get_tensor_name_map(arch, config["num_hidden_layers"])
    with translated(f"{source}: no model can be built of its metadata"), torch.device("meta"):
        spec = bodies.spec_of(bodies.LLMS[config["model_type"]].from_dict(dict(config)), source)
        body = bodies.build(spec, config["max_position_embeddings"])
    for name in shapes_of(body.state_dict()):
        yield str(theirs.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))), name
    yield EMBEDDING, "embed_tokens.weight"
    if not config["tie_word_embeddings"]:
        yield HEAD, "lm_head.weight"


def _halves_apart(name: str, rows: F32, config: Config) -> F32:
    """Llama's queries and keys as transformers has them: the two numbers of a rotary pair half a head apart.

    llama.cpp's files of this architecture hold them side by side (LlamaModel.permute in its converter).
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    part = ["", *name.split(".")][-2]
    size = config["head_dim"]
    if config["model_type"] != "llama" or part not in heads or rows.shape[0] != heads[part] * size:
        return rows
    pairs = rows.reshape(heads[part], size // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
