"""The precisions that the ONNX format offers: a component and a precision become one scheme per group of tensors."""

from __future__ import annotations

from edgeomni.errors import UsageError
from edgeomni.exporters.onnx.options import OnnxOptions
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme

PRECISIONS = ("fp32", "fp16", "int8", "int4")
_FLOATS = ("fp32", "fp16")
BODY_BLOCK = 128
"""Inputs per scale in the transformer blocks: 128 is a third faster than 32, which is more exact (`--block 32`)."""
HEAD_BLOCK = 128
"""Inputs per scale in heads and embedding: at 8 bits 128 costs no measurable accuracy and is the fastest."""


def schemes_for(component: str, precision: str, options: OnnxOptions | None = None) -> dict[str, Scheme]:
    """Tensor group -> scheme, for all groups of `component` ("encoder", "llm" or "codec").

    Portable graphs get signed schemes (positive scales, codes around 0), which DequantizeLinear takes. Raises
    UsageError for names that do not exist, and for precisions that no kernel computes or that harm the sound.
    """
    options = options or OnnxOptions()
    groups = groups_of(component)
    if precision not in PRECISIONS:
        raise UsageError(f"{component}: unknown ONNX precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision in _FLOATS:
        return dict.fromkeys(groups, Scheme(precision))
    if component == "codec":
        raise UsageError(
            f"codec:{precision} is not offered: integers make the codec no faster and audibly worse; "
            "use codec fp32 or fp16"
        )
    signed = options.flavour == "portable"
    head = Scheme("int8", HEAD_BLOCK, signed)
    if component == "encoder":
        return _encoder_schemes(precision, head)
    linear = Scheme(precision, options.block or BODY_BLOCK, signed)
    return {group: linear if group.endswith(".linear") else head for group in groups}


def _encoder_schemes(precision: str, blocked: Scheme) -> dict[str, Scheme]:
    """At INT8 the adapter's last layer is blocked: its input is a product, whose values one scale spans badly.

    One scale per window there made nine tenths of the encoder's whole error (cosine .9989 instead of .9998 at the
    real shape).
    """
    if precision == "int4":
        raise UsageError("encoder:int4 is not offered: 8 bits are the speech encoder's floor; use encoder int8")
    dynamic = Scheme("int8_dynamic")
    return {"encoder.linear": dynamic, "adapter.linear": dynamic, "adapter.proj": blocked}
