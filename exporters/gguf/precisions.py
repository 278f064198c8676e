"""The precisions that the GGUF format offers: a component and a precision become one scheme per group of tensors."""

from __future__ import annotations

from edgeomni.errors import UsageError
from edgeomni.exporters.gguf.options import HEAD_PRECISIONS, GgufOptions
from edgeomni.exporters.gguf.speech_precisions import speech_schemes
from edgeomni.quantize import gguf_kinds
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme

PRECISIONS = HEAD_PRECISIONS
_HEADS = ("text_head", "audio_head", "embedding")
_QUANTIZED_HEADS = "q8_0"
"""Heads of a quantized body: 8 bits cost little there, and an id depends on them directly."""


def scheme_named(precision: str) -> Scheme:
    """The scheme of one precision; "f16" is GGUF's own name of fp16."""
    return Scheme({"f16": "fp16"}.get(precision, precision))


def schemes_for(component: str, precision: str, options: GgufOptions | None = None) -> dict[str, Scheme]:
    """Tensor group -> scheme, for all groups of `component`.

    Raises UsageError for names that do not exist, and for components that are not written as GGUF yet.
    """
    options = options or GgufOptions()
    groups = groups_of(component)
    if component != "llm":
        return speech_schemes(component, precision)
    if precision == "fp16":
        precision = "f16"
    if precision not in PRECISIONS:
        raise UsageError(f"{component}: unknown GGUF precision {precision!r}; known are {', '.join(PRECISIONS)}")
    body = scheme_named(precision)
    heads = scheme_named(options.heads or (_QUANTIZED_HEADS if body.blocked else precision))
    return {group: heads if group in _HEADS else body for group in groups}


assert set(PRECISIONS) == {"f16" if kind == "fp16" else kind for kind in gguf_kinds.TYPES}
