"""A small builder of ONNX graphs: constants, nodes, inputs and outputs, saved with external data.

Names are counted, never random, so that exporting twice gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeomni.bundle import Port

MS = "com.microsoft"
_EXTERNAL_FROM_BYTES = 1024
_ALIGN = 4096
"""External tensors start on page boundaries, so that a reader can map them."""

Dim = int | str
FLOAT, FLOAT16, INT32, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64
BFLOAT16, INT8 = TensorProto.BFLOAT16, TensorProto.INT8
FLOAT8, FLOAT4 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1


class Graph:
    """Collects constants, nodes, inputs and outputs; every method that adds a value returns its name."""

    def __init__(self, name: str, opset: int = 21) -> None:
        self.name, self.opset = name, opset
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, NDArray[Any] | onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def unique(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self._count}"

    def input(self, name: str, dtype: int, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[Dim], value: str | None = None) -> None:
        """Declares an output; with `value` an Identity node renames that value to `name`."""
        if value is not None and value != name:
            self.op("Identity", [value], output=name)
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def const(self, value: NDArray[Any] | onnx.TensorProto, name: str | None = None) -> str:
        """Adds an initializer; a name given twice must mean the same value and is stored once."""
        name = name or self.unique("const")
        self._constants.setdefault(name, value)
        return name

    @property
    def constants(self) -> dict[str, NDArray[Any] | onnx.TensorProto]:
        """What was added so far, by name."""
        return dict(self._constants)

    def ints(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.const(np.array(values, np.int64), "ints_" + "_".join(str(v).replace("-", "m") for v in values))

    def floats(self, name: str, value: Any) -> str:
        """A constant float32 of the value's shape; a plain number becomes [1]."""
        return self.const(np.ascontiguousarray(value, np.float32), name)

    def op(
        self, kind: str, inputs: Sequence[str], *, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node with one output, named `output` or by counting, and returns that name."""
        return self.ops(kind, inputs, [output or self.unique(kind.lower())], domain=domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], outputs: int | Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node with several outputs: so many, or those named ("" leaves one out). Returns their names."""
        names = [self.unique(kind.lower()) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        node = helper.make_node(kind, list(inputs), names, name=self.unique("n_" + kind), domain=domain, **attributes)
        self._nodes.append(node)
        return names

    def split(self, x: str, count: int, axis: int) -> list[str]:
        """x in `count` equal parts along `axis`."""
        return self.ops("Split", [x], count, axis=axis, num_outputs=count)

    def save(self, path: Path) -> list[Path]:
        """Writes `path` (.onnx) and, where there are large constants, `path`.data; returns the files written."""
        data_path = path.with_name(path.name + ".data")
        initializers: list[onnx.TensorProto] = []
        offset = 0
        with data_path.open("wb") as data:
            for name, value in self._constants.items():
                tensor = value if isinstance(value, onnx.TensorProto) else None
                raw = tensor.raw_data if tensor is not None else np.ascontiguousarray(value).data
                size = len(tensor.raw_data) if tensor is not None else np.asarray(value).nbytes
                if size < _EXTERNAL_FROM_BYTES:
                    small = tensor if tensor is not None else numpy_helper.from_array(np.asarray(value), name)
                    small.name = name
                    initializers.append(small)
                    continue
                offset += data.write(b"\0" * (-offset % _ALIGN))
                initializers.append(_external(name, value, data_path.name, offset, size))
                data.write(raw)
                offset += size
        if not offset:
            data_path.unlink()
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=11 if self.opset >= 23 else 10, producer_name="edgeomni"
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
        return [path, data_path] if offset else [path]


def int_tensor(codes: NDArray[np.int8], bits: int) -> Any:
    """Signed codes -> a constant for DequantizeLinear: int8 as they are, int4 two to a byte, low half first."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    flat = (np.ascontiguousarray(codes).reshape(-1).view(np.uint8) & 15).astype(np.uint8)
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    tensor = onnx.TensorProto(data_type=TensorProto.INT4, dims=codes.shape)
    tensor.raw_data = (flat[0::2] | (flat[1::2] << 4)).tobytes()
    return tensor


def raw_tensor(kind: int, shape: Sequence[int], data: NDArray[Any]) -> onnx.TensorProto:
    """A constant of a type that numpy does not have, from its bytes."""
    tensor = onnx.TensorProto(data_type=kind, dims=shape)
    tensor.raw_data = np.ascontiguousarray(data).tobytes()
    return tensor


def _external(name: str, value: Any, location: str, offset: int, size: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    tensor.name = name
    if isinstance(value, onnx.TensorProto):
        tensor.data_type, dims = value.data_type, list(value.dims)
    else:
        tensor.data_type, dims = helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype), list(np.shape(value))
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return tensor


def signature(path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of an ONNX file, read without its weights."""
    graph = onnx.load(path, load_external_data=False).graph

    def describe(values: Any) -> list[Port]:
        return [
            Port(
                name=v.name,
                dtype=TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower(),
                shape=[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        ]

    return describe(graph.input), describe(graph.output)
