"""Graphs that compute in narrow types, rewritten: rounding where a GPU rounds, or not rounding at all.

ONNX Runtime's CPU provider computes half-precision products in float32, and drops the casts to half before and behind
them, even with all optimisations off: what it computes is more exact than what a GPU will. Products in bfloat16 and
weights in E2M1 it does not compute at all: here bfloat16 becomes float32, and E2M1 becomes INT8 of twice its value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeomni.quantize.small_floats import e2m1_values, e4m3_values

_FLOAT32, _ROUNDED, _AXIS = ".float32", ".rounded", "rounding.axis"
_INSIDE = ".inside"
_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class Rewritten(NamedTuple):
    """A graph whose data stays outside, and the constants that stand in for some of its own."""

    graph: bytes
    constants: dict[str, NDArray[Any]]


def widened(path: str) -> Rewritten:
    """The graph at `path` computing in float32, with the weights as they are stored; inputs of products as they are."""
    model, constants = _loaded(path)
    _leave_inputs(model.graph)
    _widen(model.graph, _NARROW)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
    return Rewritten(model.SerializeToString(), constants)


def rounding(path: str) -> Rewritten:
    """The graph at `path` with every value that its types round to half or bfloat16 really rounded.

    Behind each cast to half and before each cast from it stands a pair of operators that do nothing, but that ONNX
    Runtime computes in half, so that it must keep the value in half. Attention takes values in half, and computes and
    gives its result in float32, as a GPU's fused attention does within: ONNX Runtime's own would round every score.
    What is bfloat16 is rounded so, and computed in float32. Products of codes of 8 bits with such codes are exact, and
    rounded once they have their scales.
    """
    model, constants = _loaded(path)
    _fuse(model.graph)
    _widen(model.graph, (TensorProto.BFLOAT16,))
    brain = any(_cast_to(node) == TensorProto.BFLOAT16 for node in model.graph.node)
    stored, nodes, attended = {tensor.name for tensor in model.graph.initializer}, list[Any](), set[str]()
    for node in model.graph.node:
        to = _cast_to(node)
        if node.op_type == "Attention":
            nodes += [node] if brain else _widened_attention(node)
            attended.add(node.output[0])
        elif to == TensorProto.BFLOAT16:
            nodes += _through_bfloat16(node.input[0], node.output[0])
        elif to == TensorProto.FLOAT16:
            wanted = node.output[0]
            node.output[0] = wanted + _ROUNDED
            nodes += [node, *_nothing(node.output[0], wanted)]
        elif to != TensorProto.FLOAT or node.input[0] in attended or node.input[0] in stored:
            nodes.append(node)
        elif brain:
            nodes += _through_bfloat16(node.input[0], node.output[0])
        else:
            given = node.input[0]
            node.input[0] = node.output[0] + _ROUNDED
            nodes += [*_nothing(given, node.input[0]), node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), _AXIS))
    return Rewritten(model.SerializeToString(), constants)


def _loaded(path: str) -> tuple[Any, dict[str, NDArray[Any]]]:
    """The graph at `path` without its data, and what stands in for weights in E2M1 and their scales."""
    model = onnx.load(path, load_external_data=False)
    graph, folder = model.graph, str(Path(path).parent)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    scaled = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    constants, gone = dict[str, NDArray[Any]](), list[Any]()
    for node in scaled.values():
        weight = stored.get(node.input[0])
        if weight is None or weight.data_type != TensorProto.FLOAT4E2M1:
            continue
        blocks = scaled[node.input[1]]
        bits, unit = stored[blocks.input[0]], numpy_helper.to_array(stored[blocks.input[1]])
        halves = e4m3_values(_bytes(bits, folder)) * (unit / 2)
        codes = _bytes(weight, folder)
        twice = (2 * e2m1_values(np.stack([codes & 15, codes >> 4], axis=-1))).astype(np.int8)
        gone += [(blocks, node, bits.name)]
        for tensor, kind, array in ((bits, TensorProto.FLOAT, halves), (weight, TensorProto.INT8, twice)):
            constants |= _replaced(tensor, kind, array.reshape(tuple(tensor.dims)))
    for blocks, node, name in gone:
        graph.node.remove(blocks)
        node.input[1] = name
    return model, constants


def _bytes(tensor: Any, folder: str) -> NDArray[np.uint8]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.frombuffer(tensor.raw_data, np.uint8)
    place = {entry.key: entry.value for entry in tensor.external_data}
    return np.fromfile(Path(folder) / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"]))


def _replaced(tensor: Any, kind: int, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Makes the constant hold `array`; returns it by name where it is to be handed over beside the graph."""
    tensor.data_type = kind
    if tensor.data_location != TensorProto.EXTERNAL:
        tensor.raw_data = array.tobytes()
        return {}
    return {tensor.name: np.ascontiguousarray(array)}


def _leave_inputs(graph: Any) -> None:
    """Takes out the pairs that round what goes into products to 8 bits."""
    pairs = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in pairs:
            node.op_type, given = "Identity", pairs[node.input[0]].input[0]
            node.input[:] = [given]
            del node.attribute[:]
    for node in pairs.values():
        graph.node.remove(node)


def _fuse(graph: Any) -> None:
    """Products whose inputs are rounded to 8 bits see codes times scales in float32, and give their result in half."""
    made = {name: node for node in graph.node for name in node.output}
    nodes, scales = list[Any](), set[str]()
    for node in graph.node:
        nodes.append(node)
        pair = [made[name] for name in node.input if name in made] if node.op_type == "MatMul" else []
        rounded = made.get(pair[0].input[0]) if pair else None
        if rounded is None or rounded.op_type != "QuantizeLinear":
            continue
        for dequantize in pair:
            scales.add(dequantize.input[1].removesuffix(_FLOAT32))
            dequantize.input[1] = dequantize.input[1].removesuffix(_FLOAT32) + _FLOAT32
        given, node.output[0] = node.output[0], node.output[0] + _FLOAT32
        nodes.append(helper.make_node("Cast", [node.output[0]], [given], to=TensorProto.FLOAT16))
    del graph.node[:]
    graph.node.extend(helper.make_node("Cast", [s], [s + _FLOAT32], to=TensorProto.FLOAT) for s in sorted(scales))
    graph.node.extend(nodes)


def _widen(graph: Any, kinds: tuple[int, ...]) -> None:
    """Constants, inputs and outputs of these types become float32; constants by a cast, so that data stays outside."""
    narrow = {t.name for t in graph.initializer if t.data_type in kinds}
    for node in graph.node:
        node.input[:] = [name + _FLOAT32 if name in narrow else name for name in node.input]
    for i, name in enumerate(sorted(narrow)):
        graph.node.insert(i, helper.make_node("Cast", [name], [name + _FLOAT32], to=TensorProto.FLOAT))
    for port in (*graph.input, *graph.output):
        if port.type.tensor_type.elem_type in kinds:
            port.type.tensor_type.elem_type = TensorProto.FLOAT


def _cast_to(node: Any) -> int | None:
    """The type that a Cast gives; None for other operators."""
    return next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None


def _widened_attention(node: Any) -> list[Any]:
    """The node behind casts of its queries, keys and values from half to float32."""
    wide = [f"{node.output[0]}.{part}" for part in ("query", "key", "value")]
    casts = [
        helper.make_node("Cast", [x], [y], to=TensorProto.FLOAT) for x, y in zip(node.input[:3], wide, strict=True)
    ]
    node.input[:3] = wide
    return [*casts, node]


def _through_bfloat16(x: str, y: str) -> list[Any]:
    """y, float32, is x rounded to bfloat16."""
    down, kept = y + _ROUNDED, y + _ROUNDED + ".kept"
    cast = helper.make_node
    return [
        cast("Cast", [x], [down], to=TensorProto.BFLOAT16),
        *_nothing(down, kept),
        cast("Cast", [kept], [y], to=TensorProto.FLOAT),
    ]


def _nothing(x: str, y: str) -> list[Any]:
    inside = y + _INSIDE
    return [helper.make_node("Unsqueeze", [x, _AXIS], [inside]), helper.make_node("Squeeze", [inside, _AXIS], [y])]
