"""The tensors of the LLM's two files, by their GGUF names: what is written, and what must be found there again.

body.gguf is a model that llama.cpp loads, with a few rows of zeros in place of an embedding, since it is given
embeddings. heads.gguf holds the heads and, where these are not the embedding as well, the embedding's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gguf import MODEL_ARCH, TensorNameMap, get_tensor_name_map

from edgeomni.arrays import F32
from edgeomni.errors import UsageError
from edgeomni.quantize.gguf_kinds import check_width
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Scheme

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

ARCHITECTURES = {"qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3, "llama": MODEL_ARCH.LLAMA}
NO_EMBEDDING_ROWS = 32
"""Rows of zeros: llama.cpp asks for an embedding, and its smallest block-quantized types for 32 rows."""
FLOAT = Scheme("fp32")


@dataclass(frozen=True)
class Stored:
    """A tensor to store: `rows` float32 [n, k], or [k] for a gain or a bias, and the scheme that stores it."""

    name: str
    rows: F32
    scheme: Scheme


def body_tensors(model: OmniModel, schemes: Mapping[str, Scheme]) -> Iterator[Stored]:
    """Every tensor of body.gguf. Raises UsageError for widths that a scheme cannot store."""
    spec = model.spec.body
    names = get_tensor_name_map(ARCHITECTURES[spec.kind], spec.layers)
    yield Stored("token_embd.weight", np.zeros((NO_EMBEDDING_ROWS, spec.width), np.float32), FLOAT)
    for name, parameter in model.body.named_parameters():
        rows = parameter.detach().cpu().float().numpy()
        scheme = scheme_of(f"body.{name}", schemes) or FLOAT
        check_width(f"body.{name}", rows.shape[-1], scheme)
        yield Stored(_gguf_name(names, name), _reordered(name, rows, model), scheme)


def head_tensors(model: OmniModel, schemes: Mapping[str, Scheme]) -> Iterator[Stored]:
    """Every tensor of heads.gguf: text_head.weight, audio_head.weight and, if untied, embedding.weight."""
    parts = [("text_head", model.text_rows()), ("audio_head", model.audio_rows())]
    if not model.spec.tied:
        parts.append(("embedding", model.embedding.weight))
    for group, rows in parts:
        array = np.ascontiguousarray(rows.detach().cpu().float().numpy())
        check_width(group, array.shape[1], schemes[group])
        yield Stored(f"{group}.weight", array, schemes[group])


def _gguf_name(names: TensorNameMap, name: str) -> str:
    found = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UsageError(f"llama.cpp has no tensor for body.{name}; export the LLM to onnx")
    return str(found)


def _reordered(name: str, rows: F32, model: OmniModel) -> F32:
    """Llama's queries and keys, whose rotary pairs llama.cpp wants side by side rather than half a head apart."""
    spec = model.spec.body
    heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}
    part = name.split(".")[-2]
    if spec.kind != "llama" or part not in heads:
        return rows
    halves = rows.reshape(heads[part], 2, spec.head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
