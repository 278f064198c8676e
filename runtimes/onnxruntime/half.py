"""Graphs that compute in half precision, rewritten for the gate: rounding where a GPU rounds, or not rounding at all.

ONNX Runtime's CPU provider computes half-precision products in float32, and drops the casts to half before and behind
them, even with all optimisations off: what it computes is more exact than what a GPU will.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_FLOAT32, _ROUNDED, _AXIS = ".float32", ".rounded", "rounding.axis"
_INSIDE = ".inside"


def widened(path: str) -> bytes:
    """The graph at `path` computing in float32, with the weights as they are stored in half; its data stays outside."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    halves = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    for node in graph.node:
        node.input[:] = [name + _FLOAT32 if name in halves else name for name in node.input]
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for i, name in enumerate(sorted(halves)):
        graph.node.insert(i, helper.make_node("Cast", [name], [name + _FLOAT32], to=TensorProto.FLOAT))
    for port in (*graph.input, *graph.output):
        if port.type.tensor_type.elem_type == TensorProto.FLOAT16:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    return bytes(model.SerializeToString())


def rounding(path: str) -> bytes:
    """The graph at `path` with every value that its types round to half really rounded.

    Behind each cast to half and before each cast from it stands a pair of operators that do nothing, but that ONNX
    Runtime computes in half, so that it must keep the value in half. Attention takes values in half, and computes and
    gives its result in float32, as a GPU's fused attention does within: ONNX Runtime's own would round every score.
    """
    model = onnx.load(path, load_external_data=False)
    nodes, attended = list[Any](), set[str]()
    for node in model.graph.node:
        if node.op_type == "Attention":
            nodes += _widened_attention(node)
            attended.add(node.output[0])
            continue
        to = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
        if to == TensorProto.FLOAT16:
            wanted = node.output[0]
            node.output[0] = wanted + _ROUNDED
            nodes += [node, *_nothing(node.output[0], wanted)]
        elif to == TensorProto.FLOAT and node.input[0] not in attended:
            given = node.input[0]
            node.input[0] = node.output[0] + _ROUNDED
            nodes += [*_nothing(given, node.input[0]), node]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), _AXIS))
    return bytes(model.SerializeToString())


def _widened_attention(node: Any) -> list[Any]:
    """The node behind casts of its queries, keys and values from half to float32."""
    wide = [f"{node.output[0]}.{part}" for part in ("query", "key", "value")]
    casts = [
        helper.make_node("Cast", [x], [y], to=TensorProto.FLOAT) for x, y in zip(node.input[:3], wide, strict=True)
    ]
    node.input[:3] = wide
    return [*casts, node]


def _nothing(x: str, y: str) -> list[Any]:
    inside = y + _INSIDE
    return [helper.make_node("Unsqueeze", [x, _AXIS], [inside]), helper.make_node("Squeeze", [inside, _AXIS], [y])]
