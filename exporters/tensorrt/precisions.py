"""The precisions that the TensorRT format offers: a component and a precision become one scheme per tensor group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeomni.errors import UsageError
from edgeomni.exporters.tensorrt.options import BLOCKS, TensorRtOptions
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme
from edgeomni.quantize.tensorrt_kinds import INTEGERS
from edgeomni.tensorrt_targets import check_precision

if TYPE_CHECKING:
    from edgeomni.spec import OmniSpec

PRECISIONS = ("fp32", "fp16", "int8", "int4")
_FLOATS = ("fp32", "fp16")
_NOT_YET = ("fp8", "nvfp4", "bf16")


def schemes_for(
    component: str, precision: str, options: TensorRtOptions | None = None, block: int | None = None
) -> dict[str, Scheme]:
    """Tensor group -> scheme, for all groups of `component`.

    INT4 is for the LLM's transformer blocks; its heads and embedding are INT8 then, as is the speech encoder. `block`:
    the inputs per scale that fit the model (`block_for`). Raises UsageError for names that do not exist, and for what a
    target does not compute.
    """
    options = options or TensorRtOptions()
    groups = groups_of(component)
    if precision in _NOT_YET:
        raise UsageError(
            f"{component}:{precision} is not offered for TensorRT yet: its scales need calibration, or ONNX Runtime "
            f"cannot judge it; use {', '.join(reversed(PRECISIONS))}"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"{component}: unknown TensorRT precision {precision!r}; known are {', '.join(PRECISIONS)}")
    check_precision(precision, options.targets)
    if precision in _FLOATS:
        return dict.fromkeys(groups, Scheme(precision))
    if component == "codec":
        raise UsageError(f"codec:{precision} is not offered: integers are audibly worse; use codec fp16 or fp32")
    if component == "encoder" and precision == "int4":
        raise UsageError("encoder:int4 is not offered: 8 bits are the speech encoder's floor; use encoder int8")
    block = options.block or block or BLOCKS[-1]
    linear, rest = Scheme(INTEGERS[precision], block), Scheme(INTEGERS["int8"], block)
    return {group: linear if group.endswith((".linear", ".proj")) else rest for group in groups}


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
