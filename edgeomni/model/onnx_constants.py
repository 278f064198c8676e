"""The constants of an ONNX graph and where it uses them, for graph_weights.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import external_data_helper, numpy_helper
from torch import Tensor

from ..errors import CheckpointError
from .graph_weights import Constant, Use

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
_QUANTIZED = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulNBits",
    "QLinearConv",
    "QLinearMatMul",
}


def constants(path: Path) -> list[Constant]:
    """All floating-point tensors of the graph, read when asked for.

    Raises CheckpointError for quantized graphs and for external data outside the directory; what onnx raises over a
    damaged file passes through.
    """
    graph = onnx.load(path, load_external_data=False).graph
    if found := sorted(_QUANTIZED & {node.op_type for node in graph.node}):
        raise CheckpointError(
            f"{path}: its weights are quantized ({found[0]}); export it again in fp32, and let `edgeomni export` "
            "quantize it"
        )
    tensors = {tensor.name: tensor for tensor in [*graph.initializer, *_constant_nodes(graph)]}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.data_type in _FLOATS and tensor.dims}
    for tensor in tensors.values():
        _check_place(tensor, path)
    names, uses = _uses(graph, set(tensors))
    return [
        Constant(tuple(names[name]), tuple(tensor.dims), tuple(uses[name]), _Reader(tensor, path.parent))
        for name, tensor in tensors.items()
    ]


class _Reader:
    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        self._tensor, self._folder = tensor, folder

    def __call__(self) -> Tensor:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._tensor)
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(self._folder))
        return torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32))


def _check_place(tensor: onnx.TensorProto, path: Path) -> None:
    """External data must be a plain file beside the graph: optimum writes no other, and a path may lead anywhere."""
    if not external_data_helper.uses_external_data(tensor):
        return
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    file = path.parent / location
    if Path(location).name != location or file.is_symlink() or not file.is_file():
        raise CheckpointError(
            f"{path}: reads weights from {location!r}, which is no file beside it; copy the whole directory again"
        )


def _constant_nodes(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                tensor = onnx.TensorProto()
                tensor.CopyFrom(attribute.t)
                tensor.name = node.output[0]
                yield tensor


def _uses(graph: onnx.GraphProto, constants: set[str]) -> tuple[dict[str, list[str]], dict[str, list[Use]]]:
    """Constant -> its names, the aliases included; constant -> where it is used."""
    origin = {name: (name, False) for name in constants}
    names, uses = {name: [name] for name in constants}, defaultdict[str, list[Use]](list)
    for node in graph.node:  # in order: what a node reads was written before
        for place, text in enumerate(node.input):
            if text not in origin:
                continue
            name, flipped = origin[text]
            if node.op_type in ("Cast", "Identity"):
                origin[node.output[0]] = name, flipped
                names[name].append(node.output[0])
            elif node.op_type == "Transpose" and _permutation(node) == [1, 0]:
                origin[node.output[0]] = name, not flipped
            elif use := _use(node, place, flipped):
                uses[name].append(use)
    return names, uses


def _use(node: onnx.NodeProto, place: int, flipped: bool) -> Use | None:
    scope = ".".join(node.name.strip("/").split("/")[:-1])
    if node.op_type == "MatMul" and place == 1:
        return Use(scope, "weight", not flipped)
    if node.op_type == "Gemm" and place == 1:
        whole = any(a.name == "transB" and a.i for a in node.attribute)
        return Use(scope, "weight", flipped == whole)
    if node.op_type in ("Conv", "Gemm", "LayerNormalization") and place:
        return Use(scope, "weight" if place == 1 else "bias")
    if node.op_type in ("Gather", "Mul", "RMSNormalization"):
        return Use(scope, "weight", flipped)
    return Use(scope, "bias") if node.op_type == "Add" else None


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
