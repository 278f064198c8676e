"""Does a quantized graph really run on integer kernels, after ONNX Runtime's own optimisations?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeomni.bundle import Bundle, Component
from edgeomni.quantize.schemes import Scheme, parse
from edgeomni.runtimes.onnxruntime.sessions import optimized_ops

GROUPS_OF_GRAPH = {
    "encoder": ("encoder.linear", "adapter.linear", "adapter.proj"),
    "body": ("body.linear",),
    "tts": ("tts.linear",),
    "text_head": ("text_head",),
    "audio_head": ("audio_head",),
}
"""Graph -> tensor groups whose schemes say which kernels its linear layers run on."""
_LINEAR = ("MatMulNBits", "MatMul:constant", "DynamicQuantizeMatMul", "MatMulInteger", "DequantizeLinear")


def wrong_kernels(bundle: Bundle, component: Component) -> int | None:
    """Linear layers of a component's graphs that run on the wrong kernel; None where no kernel is asked for."""
    if component.name == "codec" or component.meta.get("flavour") != "ort":
        return None
    wrong = 0
    for role, graph in component.graphs.items():
        schemes = [parse(component.scheme[g]) for g in GROUPS_OF_GRAPH[role] if g in component.scheme]
        if any(s.kind not in ("fp32", "fp16") for s in schemes):
            wrong += count_wrong(schemes, optimized_ops(bundle.file(graph.path)))
    return wrong


def count_wrong(schemes: Iterable[Scheme], ops: Mapping[str, int]) -> int:
    """Linear layers of an optimised graph (operator -> count) that run on none of the integer kernels of `schemes`.

    A kernel that should run and does not appear at all counts as one.
    """
    wanted = {
        "DynamicQuantizeMatMul" if s.kind == "int8_dynamic" else f"MatMulNBits:bits={s.bits}:acc=4" for s in schemes
    }
    others = sum(count for op, count in ops.items() if op.startswith(_LINEAR) and op not in wanted)
    return others + sum(not ops.get(op) for op in wanted)
