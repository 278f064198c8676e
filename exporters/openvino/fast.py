"""Faster arithmetic than float32 of the CPU at hand: `--fast` has the gate judge it, and the manifest record it.

Left to itself, OpenVINO would take bfloat16 or float16 between layers wherever the CPU has it, and round the inputs of
compressed layers to 8 bits wherever it has VNNI. A gate on a machine without them cannot see what they change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgeomni import hardware
from edgeomni.component_meta import OpenVinoArithmetic
from edgeomni.errors import UsageError
from edgeomni.quantize.schemes import Scheme

_VNNI = {"avx_vnni", "avx512_vnni"}


def of_this_cpu() -> OpenVinoArithmetic:
    """All that this CPU has. float16, where there are both, because it rounds to 11 bits and bfloat16 to 8.

    Raises EngineError where OpenVINO is not installed.
    """
    from edgeomni.openvino_library import ov

    known = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    int8_inputs = bool(_VNNI & set(hardware.detect().isa))
    if "FP16" in known:
        return OpenVinoArithmetic(compute="f16", int8_inputs=int8_inputs)
    return OpenVinoArithmetic(compute="bf16" if "BF16" in known else "f32", int8_inputs=int8_inputs)


def check() -> None:
    """Raises UsageError where this CPU has nothing faster, so that there is nothing for the gate to judge."""
    if of_this_cpu() == OpenVinoArithmetic():
        raise UsageError(
            f"--fast: this CPU ({hardware.cpu_name()}) has no bfloat16, float16 or VNNI for OpenVINO, so the gate "
            "cannot judge what they change; export on a machine that has what the device has, or without --fast"
        )


def meta(fast: bool, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The entries of a component's meta: nothing without `fast`; no 8-bit inputs where no weights are compressed."""
    if not fast:
        return {}
    found = of_this_cpu()
    integer = any(scheme.blocked for scheme in schemes.values())
    return {**asdict(found), "int8_inputs": found.int8_inputs and integer}
