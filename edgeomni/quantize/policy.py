"""Which tensor is stored how: a component and a precision become one scheme per group of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import UsageError
from .schemes import Scheme

PRECISIONS = ("fp32", "fp16", "int8", "int4")
BODY_BLOCK = 128
"""Inputs per scale in the transformer blocks: 128 is a third faster than 32, which is more exact (`--block 32`)."""
HEAD_BLOCK = 128
"""Inputs per scale in heads and embedding: at 8 bits 128 costs no measurable accuracy and is the fastest."""
BLOCKS = (16, 32, 64, 128, 256)

_LLM_GROUPS = ("body.linear", "tts.linear", "text_head", "audio_head", "embedding")
_PROJECTION = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
_GROUP_OF = (
    (re.compile(r"encoder\.layers\.\d+\.(self_attn\.\w+_proj|fc1|fc2)\.weight"), "encoder.linear"),
    (re.compile(r"adapter\.fc_[12]\.weight"), "adapter.linear"),
    (re.compile(r"adapter\.proj\.weight"), "adapter.proj"),
    (re.compile(rf"body\.{_PROJECTION}"), "body.linear"),
    (re.compile(rf"tts\.{_PROJECTION}"), "tts.linear"),
    (re.compile(r"text_head\.weight"), "text_head"),
    (re.compile(r"audio_head\.weight"), "audio_head"),
    (re.compile(r"embedding\.weight"), "embedding"),
    (re.compile(r"codec\..+"), "codec"),
)


def component_precisions(precision: str) -> dict[str, str]:
    """One word for the whole model -> the precision of each component.

    8 bits are the encoder's floor, and the codec stays float: integers gain it nothing.
    """
    _known(precision)
    return {
        "encoder": "int8" if precision == "int4" else precision,
        "llm": precision,
        "codec": precision if precision in ("fp32", "fp16") else "fp32",
    }


def schemes_for(component: str, precision: str, block: int | None = None, *, signed: bool = False) -> dict[str, Scheme]:
    """Scheme of each tensor group of `component` ("encoder", "llm" or "codec").

    `block` replaces the default block of the transformer's blocked schemes; `signed` asks for positive scales and
    signed codes (the portable graphs). Raises UsageError for what no kernel does, or what would not sound.
    """
    _known(precision)
    if component == "llm":
        return _llm_schemes(precision, block, signed)
    if component == "encoder":
        if precision == "int4":
            raise UsageError("encoder:int4 is not offered: 8 bits are the speech encoder's floor; use encoder int8")
        return _encoder_schemes(precision, signed)
    if component == "codec":
        if precision in ("int8", "int4"):
            raise UsageError(
                f"codec:{precision} is not offered: integers make the codec no faster and audibly worse; "
                "use codec fp32 or fp16"
            )
        return {"codec": _float(precision)}
    raise UsageError(f"unknown component {component!r}; known are encoder, llm, codec")


def scheme_of(parameter: str, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """Scheme of an OmniModel parameter by its name; None = it stays fp32 (norms, biases, convolutions)."""
    for pattern, group in _GROUP_OF:
        if pattern.fullmatch(parameter):
            return schemes.get(group)
    return None


def _known(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")


def _float(precision: str) -> Scheme:
    return Scheme("fp16") if precision == "fp16" else Scheme("fp32")


def _encoder_schemes(precision: str, signed: bool) -> dict[str, Scheme]:
    """At INT8 the adapter's last layer is blocked: its input, a product, is too spread for one scale per window.

    One scale there was nine tenths of the encoder's whole error (cosine .9989 instead of .9998 at the real shape).
    """
    scheme = Scheme("int8_dynamic") if precision == "int8" else _float(precision)
    last = Scheme("int8", HEAD_BLOCK, signed) if precision == "int8" else scheme
    return {"encoder.linear": scheme, "adapter.linear": scheme, "adapter.proj": last}


def _llm_schemes(precision: str, block: int | None, signed: bool) -> dict[str, Scheme]:
    if precision in ("fp32", "fp16"):
        return dict.fromkeys(_LLM_GROUPS, _float(precision))
    if block is not None and block not in BLOCKS:
        raise UsageError(f"block {block} is not offered; known are {', '.join(map(str, BLOCKS))}")
    linear = Scheme("int4" if precision == "int4" else "int8", block or BODY_BLOCK, signed)
    head = Scheme("int8", HEAD_BLOCK, signed)
    return {group: linear if group.endswith(".linear") else head for group in _LLM_GROUPS}
