"""The precisions that the TensorRT format offers: a component and a precision become one scheme per tensor group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeomni.errors import UsageError
from edgeomni.exporters.tensorrt.options import BLOCKS, TensorRtOptions
from edgeomni.quantize import small_floats  # makes bf16 known  # noqa: F401
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme, kind_of
from edgeomni.quantize.tensorrt_kinds import INTEGERS
from edgeomni.tensorrt_targets import check_precision

if TYPE_CHECKING:
    from edgeomni.spec import OmniSpec

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8w", "int4", "fp8", "nvfp4")
FLOATS = ("fp32", "fp16", "bf16")
_CODEC = ("fp32", "fp16")
_LINEAR = {
    "bf16": "bf16",
    "int8": "int8_static",
    "int8w": INTEGERS["int8"],
    "int4": INTEGERS["int4"],
    "fp8": "fp8",
    "nvfp4": "nvfp4",
}
"""Precision -> kind of the linear layers. In FP8 the LLM's inputs stay half: rounding them misses the gate's limit."""
_ENCODER = {**_LINEAR, "fp8": "fp8_static"}
_FP8_BLOCK = 32
_SENSITIVE = "mlp.down_proj"
"""The layer of each block whose inputs INT8 does not round: their few large values cost half of the accuracy."""
_TOO_COARSE = {"int4": "int8", "nvfp4": "fp8"}
"""What the speech encoder is not offered in, and what to take for it."""


def schemes_for(
    component: str, precision: str, options: TensorRtOptions | None = None, block: int | None = None
) -> dict[str, Scheme]:
    """Tensor group -> scheme, for all groups of `component`.

    INT4 and NVFP4 are for the LLM's transformer blocks. Its heads and embedding have 8-bit weights with blocks at all
    precisions that are not float, and half with bf16, in which logits would be too coarse. `block`: the inputs per
    scale that fit the model (`block_for`). Raises UsageError for names that do not exist, and for what a target does
    not compute.
    """
    options = options or TensorRtOptions()
    groups = groups_of(component)
    if precision not in PRECISIONS:
        raise UsageError(f"{component}: unknown TensorRT precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if component == "codec" and precision not in _CODEC:
        raise UsageError(f"codec:{precision} is not offered: fewer bits are audibly worse; use codec fp16 or fp32")
    if component == "encoder" and precision in _TOO_COARSE:
        raise UsageError(
            f"encoder:{precision} is not offered: 8 bits are the speech encoder's floor; "
            f"use encoder {_TOO_COARSE[precision]}"
        )
    check_precision(precision, options.targets)
    if precision in ("fp32", "fp16"):
        return dict.fromkeys(groups, Scheme(precision))
    block = options.block or block or BLOCKS[-1]
    if component == "encoder":
        return dict.fromkeys(groups, _scheme(_ENCODER[precision], block))
    linear = _scheme(_LINEAR[precision], block)
    rest = Scheme("fp16") if precision == "bf16" else Scheme(INTEGERS["int8"], block)
    return {group: linear if group.endswith(".linear") else rest for group in groups}


def sensitive_layers(spec: OmniSpec, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Weights of the LLM -> what they have in place of their group's static scheme."""
    counts = {"body": spec.body.layers, "tts": spec.tts_layers}
    return {
        f"{stack}.layers.{i}.{_SENSITIVE}.weight": schemes["text_head"]
        for stack, layers in counts.items()
        for i in range(layers)
        if schemes[f"{stack}.linear"].category == "static"
    }


def _scheme(kind: str, block: int) -> Scheme:
    """`block` counts for kinds that leave it open; E4M3 has blocks of _FP8_BLOCK at most."""
    block = min(block, _FP8_BLOCK) if kind == "fp8" else block
    return Scheme(kind, block if kind_of(kind).block is None else 0)


def block_for(component: str, spec: OmniSpec, options: TensorRtOptions) -> int:
    """The largest block that divides all widths of the component's quantized weights, or the one asked for.

    TensorRT takes no block that a row's end cuts off. Raises UsageError where none, or not the one asked for, fits.
    """
    if component == "encoder":
        widths = {spec.encoder.width, spec.encoder.ffn, spec.adapter.hidden or spec.encoder.width}
    else:
        widths = {spec.body.width, spec.body.ffn, spec.body.heads * spec.body.head_dim}
    fitting = [b for b in BLOCKS if not any(width % b for width in widths)]
    if options.block and options.block not in fitting or not fitting:
        what = f"block {options.block} does not divide" if options.block else "no block that TensorRT takes divides"
        raise UsageError(
            f"{component}: {what} all of the widths {', '.join(map(str, sorted(widths)))}; "
            f"use {f'block {fitting[-1]}' if fitting else 'fp16'}"
        )
    return options.block or fitting[-1]
