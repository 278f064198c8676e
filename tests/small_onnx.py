"""ONNX files of a few operators, for tests of what is read out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

X, Y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")


def saved(path: Path, nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(nodes, "g", [X], [Y], [numpy_helper.from_array(a, name) for name, a in tensors.items()])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def node(kind: str, *inputs: str, name: str = "/fc/op", out: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [out], name=name, **attributes)
