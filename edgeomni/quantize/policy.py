"""Which tensors belong together, and what one precision for the whole model means for each component.

How a group of tensors is stored at a precision is decided by the format (exporters/<format>), because it depends on
the kernels that will run it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import UsageError
from .schemes import Scheme

_GROUPS = {
    "encoder": ("encoder.linear", "adapter.linear", "adapter.proj"),
    "llm": ("body.linear", "tts.linear", "text_head", "audio_head", "embedding"),
    "codec": ("codec",),
}
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
_ENCODER_FLOOR = {"int4": "int8", "nvfp4": "fp8"} | dict.fromkeys(("q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k"), "q8_0")
"""8 bits are the speech encoder's floor."""
_CODEC_FLOATS = {"fp32": "fp32", "fp16": "fp16"} | dict.fromkeys(
    ("f16", "bf16", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0"), "f16"
)
"""The codec stays float. GGUF's kernels read half precision as it is, so that its precisions bring f16."""


_HALF_CODEC = {"tensorrt": {"fp32": "fp32"}}
"""Formats for GPUs, whose codec is half unless all is float32."""


def component_precisions(precision: str, format: str = "onnx") -> dict[str, str]:
    """One precision for the whole model -> the precision of each component in `format`.

    The codec stays float, because integers gain it nothing; for GPUs, which compute half faster, in half. Whether a
    component's format offers the precision is for the format to say: names that only one format knows (q4_k_m) go to
    the encoder and the LLM as they are.
    """
    return {
        "encoder": _ENCODER_FLOOR.get(precision, precision),
        "llm": precision,
        "codec": _HALF_CODEC.get(format, _CODEC_FLOATS).get(precision, "fp16" if format in _HALF_CODEC else "fp32"),
    }


def groups_of(component: str) -> tuple[str, ...]:
    """The groups of tensors of a component that a format may store differently. Raises UsageError for other names."""
    if component not in _GROUPS:
        raise UsageError(f"unknown component {component!r}; known are {', '.join(_GROUPS)}")
    return _GROUPS[component]


def scheme_of(parameter: str, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """Scheme of an OmniModel parameter by its name; None = it stays fp32 (norms, biases, convolutions).

    `schemes` maps groups to schemes, and single parameters that differ from their group by their own names.
    """
    if parameter in schemes:
        return schemes[parameter]
    for pattern, group in _GROUP_OF:
        if pattern.fullmatch(parameter):
            return schemes.get(group)
    return None
