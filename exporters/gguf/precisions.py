"""The precisions that the GGUF format offers: a component and a precision become schemes of tensor groups.

q4_k_m, q5_k_m and q6_k are llama.cpp's mixtures: which tensors of the body are stored in more bits, and what replaces
types whose blocks of 256 do not divide a tensor's inputs, is chosen as `llama_tensor_get_type` chooses
(src/llama-quant.cpp of ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from edgeomni.errors import UsageError
from edgeomni.exporters.gguf.options import GgufOptions
from edgeomni.exporters.gguf.speech_precisions import speech_schemes
from edgeomni.quantize.gguf_kinds import fitting
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme

PRECISIONS = ("fp32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0")
_KINDS = {"f16": "fp16", "q4_k_m": "q4_k", "q5_k_m": "q5_k"}
"""Precision -> the kind of most of the body's tensors, where their names differ."""
_MIXED = ("q4_k_m", "q5_k_m")
_HEADS = ("text_head", "audio_head", "embedding")
_QUANTIZED_HEADS = "q8_0"
"""Heads of a quantized body: 8 bits cost little there, and an id depends on them directly."""


def scheme_named(precision: str) -> Scheme:
    """The scheme of one precision; "f16" is GGUF's own name of fp16."""
    return Scheme(_KINDS.get(precision, precision))


def checked_precision(component: str, precision: str) -> str:
    """The precision by the name that GGUF has for it. Raises UsageError for names that do not exist."""
    precision = {"fp16": "f16"}.get(precision, precision)
    if precision not in PRECISIONS:
        raise UsageError(f"{component}: unknown GGUF precision {precision!r}; known are {', '.join(PRECISIONS)}")
    return precision


def schemes_for(component: str, precision: str, options: GgufOptions | None = None) -> dict[str, Scheme]:
    """Tensor group -> scheme, for all groups of `component`.

    Raises UsageError for names that do not exist and for precisions that a component is not offered in.
    """
    options = options or GgufOptions()
    groups = groups_of(component)
    if component != "llm":
        return speech_schemes(component, precision)
    body = scheme_named(checked_precision(component, precision))
    heads = scheme_named(options.heads or (_QUANTIZED_HEADS if body.blocked else precision))
    return {group: heads if group in _HEADS else body for group in groups}


def mixture(precision: str, linears: Mapping[str, int], layers: int, group: str) -> dict[str, Scheme]:
    """How the linear layers of a stack of blocks are stored: `group` -> the commonest scheme, and parameters besides.

    `linears` maps their parameters' names ("body.layers.3.mlp.down_proj.weight") to their numbers of inputs.
    """
    schemes = {name: Scheme(fitting(_kind(precision, name, layers), width)) for name, width in linears.items()}
    common = Counter(schemes.values()).most_common(1)[0][0]
    return {group: common, **{name: scheme for name, scheme in schemes.items() if scheme != common}}


def _kind(precision: str, name: str, layers: int) -> str:
    layer = int(name.split(".")[2])
    sensitive = name.endswith((".v_proj.weight", ".down_proj.weight"))
    if precision in _MIXED and sensitive and _more_bits(layer, layers):
        return "q6_k"
    return scheme_named(precision).kind


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and the last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
