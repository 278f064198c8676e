"""The precisions that the OpenVINO format offers: component and precision become one scheme per group of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from edgeomni.errors import UsageError
from edgeomni.exporters.openvino.options import OpenVinoOptions
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme
from edgeomni.spec import OmniSpec

PRECISIONS = ("fp32", "fp16", "int8", "int4")
_FLOATS = ("fp32", "fp16")
BLOCK = 128
"""Inputs per scale, as in the ONNX format, so that the two formats hold the same weights."""
_SMALLEST = 8
"""Inputs that may share a scale at least; with fewer the scales would outweigh the codes."""


def schemes_for(component: str, precision: str, options: OpenVinoOptions | None = None) -> dict[str, Scheme]:
    """Tensor group -> scheme, for all groups of `component` ("encoder", "llm" or "codec").

    A model whose widths are no multiples of a scheme's block gets smaller blocks (`fitted`). Raises UsageError for
    names that do not exist, and for precisions that gain nothing or harm the sound.
    """
    options = options or OpenVinoOptions()
    groups = groups_of(component)
    if precision not in PRECISIONS:
        raise UsageError(f"{component}: unknown OpenVINO precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision in _FLOATS:
        return dict.fromkeys(groups, Scheme(precision))
    if component == "codec":
        raise UsageError(
            f"codec:{precision} is not offered: integers make the codec no faster and audibly worse; "
            "use codec fp32 or fp16"
        )
    if component == "encoder" and precision == "int4":
        raise UsageError("encoder:int4 is not offered: 8 bits are the speech encoder's floor; use encoder int8")
    eight = Scheme("int8", BLOCK)
    if component == "encoder":
        return dict.fromkeys(groups, eight)
    linear = Scheme(precision, options.block or BLOCK)
    return {group: linear if group.endswith(".linear") else eight for group in groups}


def fitted(schemes: Mapping[str, Scheme], spec: OmniSpec) -> dict[str, Scheme]:
    """The same schemes with blocks that divide every width of their group, as OpenVINO's kernels want them.

    Raises UsageError where no block of a useful size does.
    """
    return {group: _fitted(scheme, group, _widths(group, spec)) for group, scheme in schemes.items()}


def _fitted(scheme: Scheme, group: str, widths: tuple[int, ...]) -> Scheme:
    if not scheme.blocked:
        return scheme
    block = math.gcd(scheme.block, *widths)
    if block < _SMALLEST:
        raise UsageError(
            f"{group} has {' and '.join(map(str, widths))} inputs, which no block of {_SMALLEST} or more divides, as "
            f"OpenVINO's {scheme.kind} kernels need; export it as fp16, or to ONNX"
        )
    return replace(scheme, block=block)


def _widths(group: str, spec: OmniSpec) -> tuple[int, ...]:
    """Inputs of the linear layers of a group."""
    body, encoder = spec.body, spec.encoder
    if group in ("body.linear", "tts.linear"):
        return tuple(dict.fromkeys((body.width, body.heads * body.head_dim, body.ffn)))
    if group == "encoder.linear":
        return encoder.width, encoder.ffn
    if group == "adapter.proj":
        return (spec.adapter.hidden if spec.adapter.kind == "swiglu" else encoder.width,)
    return (encoder.width,) if group == "adapter.linear" else (body.width,)
