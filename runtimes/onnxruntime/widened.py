"""An ONNX graph with all of its half precision widened to float32: the exact mode of a TensorRT bundle's graphs."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

_SUFFIX = ".float32"


def widened(path: str) -> bytes:
    """The graph at `path`, computing in float32 with the weights as they are stored in half; its data stays outside."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    halves = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    for node in graph.node:
        node.input[:] = [name + _SUFFIX if name in halves else name for name in node.input]
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for i, name in enumerate(sorted(halves)):
        graph.node.insert(i, helper.make_node("Cast", [name], [name + _SUFFIX], to=TensorProto.FLOAT))
    for port in (*graph.input, *graph.output):
        if port.type.tensor_type.elem_type == TensorProto.FLOAT16:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    return bytes(model.SerializeToString())
