"""The tensors of the LLM's files, by their GGUF names: what is written, and what must be found there again.

body.gguf is a model that llama.cpp loads, with a few rows of zeros in place of an embedding, since it is given
embeddings; tts.gguf holds the blocks of a TTS adapter in the same way. heads.gguf holds the heads and, where no head
shares them, rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, TensorNameMap, get_tensor_name_map

from edgeomni.arrays import F32
from edgeomni.errors import UsageError
from edgeomni.gguf_llm import NO_EMBEDDING_ROWS, ROPE_FREQS, head_shapes, rope_type
from edgeomni.quantize.gguf_kinds import TYPES, check_width
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Scheme, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

ARCHITECTURES = {"qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3, "llama": MODEL_ARCH.LLAMA}
FLOAT = Scheme("fp32")
Importance = Mapping[str, F32]
"""Parameter of the model -> how much an error in each of its inputs matters, float32 [inputs]."""


@dataclass(frozen=True)
class Stored:
    """A tensor to store: `rows` float32 [n, k], or [k] for a gain or a bias, and the scheme that stores it."""

    name: str
    rows: F32
    scheme: Scheme
    importance: F32 | None = None

    @property
    def type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[TYPES[self.scheme.kind]]

    def packed(self) -> np.ndarray[Any, Any]:
        """The tensor as the file holds it. Gains and biases stay float32."""
        if self.rows.ndim == 1:
            return self.rows
        return quantize(self.rows, self.scheme, self.importance).data


def stacks(model: OmniModel) -> dict[str, tuple[Any, int]]:
    """ "body" and, with a TTS adapter, "tts" -> its module and number of blocks."""
    found = {"body": (model.body, model.spec.body.layers)}
    return found | ({"tts": (model.tts, model.spec.tts_layers)} if model.spec.tts_layers else {})


def linear_widths(model: OmniModel, role: str) -> dict[str, int]:
    """The parameters of a stack's linear layers, by the model's names -> their numbers of inputs."""
    module, _ = stacks(model)[role]
    return {
        f"{role}.{name}": int(parameter.shape[1]) for name, parameter in module.named_parameters() if parameter.ndim > 1
    }


def stack_tensors(
    model: OmniModel, role: str, schemes: Mapping[str, Scheme], importance: Importance | None = None
) -> Iterator[Stored]:
    """Every tensor of body.gguf or tts.gguf. Raises UsageError for widths that a scheme cannot store."""
    module, layers = stacks(model)[role]
    body = model.spec.body
    names = _names(model, layers)
    yield Stored("token_embd.weight", np.zeros((NO_EMBEDDING_ROWS, body.width), np.float32), FLOAT)
    if rope_type(body) == "llama3":
        yield Stored(ROPE_FREQS, _rope_factors(model), FLOAT)
    for name, parameter in module.named_parameters():
        rows = _array(parameter)
        scheme = scheme_of(f"{role}.{name}", schemes) or FLOAT
        check_width(f"{role}.{name}", rows.shape[-1], scheme)
        weights = (importance or {}).get(f"{role}.{name}")
        yield Stored(_gguf_name(names, name), _reordered(name, rows, model), scheme, weights)


def importance_of(model: OmniModel, imatrix: Path) -> Importance:
    """The body's entries of a file of llama.cpp's importance matrix, by the model's names.

    Raises DataError for a file that cannot be read, UsageError for one that does not belong to this body.
    """
    from edgeomni.quantize.imatrix import read

    found, names, importance = read(imatrix), _names(model, model.spec.body.layers), {}
    for name, width in linear_widths(model, "body").items():
        stored = _gguf_name(names, name.removeprefix("body."))
        if stored not in found or found[stored].shape != (width,):
            there = f"{list(found[stored].shape)} entries" if stored in found else "no entries"
            raise UsageError(f"{imatrix} has {there} for {stored}, not {width}: it was made with another model")
        importance[name] = found[stored]
    return importance


def _names(model: OmniModel, layers: int) -> TensorNameMap:
    return get_tensor_name_map(ARCHITECTURES[model.spec.body.kind], layers)


def head_tensors(model: OmniModel, schemes: Mapping[str, Scheme]) -> Iterator[Stored]:
    """Every tensor of heads.gguf. Raises UsageError for a width that a scheme cannot store."""
    split = model.spec.layout.text_vocab
    rows: dict[str, Callable[[], Any]] = {
        "text_head": model.text_rows,
        "audio_head": model.audio_rows,
        "text_embedding": lambda: model.embedding.weight[:split],
        "audio_embedding": lambda: model.embedding.weight[split:],
    }
    for name in head_shapes(model.spec):
        part = name.removesuffix(".weight")
        array, scheme = _array(rows[part]()), schemes["embedding" if part.endswith("embedding") else part]
        check_width(part, array.shape[1], scheme)
        yield Stored(name, array, scheme)


def _array(tensor: Any) -> F32:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _gguf_name(names: TensorNameMap, name: str) -> str:
    found = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UsageError(f"llama.cpp has no tensor for {name}; export the LLM to onnx (--llm onnx:int4)")
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


def _rope_factors(model: OmniModel) -> F32:
    """What llama.cpp divides its rotary frequencies by: theta^(-2i / head_dim) over the model's own."""
    body = model.spec.body
    plain = body.rope_theta ** (-np.arange(0, body.head_dim, 2, dtype=np.float64) / body.head_dim)
    return (plain / model.body.rotary_emb.inv_freq.double().cpu().numpy()).astype(np.float32)
