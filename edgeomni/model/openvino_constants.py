"""The constants of a graph in OpenVINO's format (an XML file, a file of weights) and where it uses them.

Read without OpenVINO, for graph_weights.py. The format: https://docs.openvino.ai, "OpenVINO IR format".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .graph_weights import Constant, Use

_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
_QUANTIZED = {"i4", "u4", "i8", "u8", "nf4", "f4e2m1", "f8e4m3", "f8e5m2"}
_MODULE, _SELF, _COMPRESSED = "__module.", "self.", "_compressed"


def constants(path: Path) -> list[Constant]:
    """All floating-point tensors of the graph, read when asked for.

    Raises CheckpointError for quantized weights, a document type, and weights outside their file; what the XML parser
    raises over a damaged file passes through.
    """
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise CheckpointError(f"{path}: has a document type, which OpenVINO never writes; export it again")
    graph = _Graph(ElementTree.fromstring(text), path.with_suffix(".bin"))
    found = list[Constant]()
    for layer, data in graph.constants():
        kind, shape = data["element_type"], tuple(int(n) for n in data["shape"].split(",") if n.strip())
        if kind in _QUANTIZED and len(shape) > 1:
            raise CheckpointError(
                f"{path}: its weights are quantized ({kind}); export it again with --weight-format fp32, and let "
                "`edgeomni export` quantize it"
            )
        if kind not in _FLOATS or not shape:
            continue
        read = graph.reader(data, shape)
        name = graph.name(layer).removeprefix(_SELF).removesuffix(_COMPRESSED)
        found.append(Constant((name,), shape, tuple(graph.uses(layer)), read))
        found += [
            Constant((), shape, (Use(scope, "bias"),), _Scaled(read, scale))
            for scope, scale in graph.scaled_biases(layer)
        ]
    return found


class _Reader:
    def __init__(self, weights: Path, offset: int, size: int, kind: str, shape: tuple[int, ...]) -> None:
        self._weights, self._offset, self._size, self._kind, self._shape = weights, offset, size, kind, shape

    def __call__(self) -> Tensor:
        kind = _FLOATS[self._kind]
        if min(self._shape) < 1 or self._offset < 0 or self._size != math.prod(self._shape) * kind.itemsize:
            raise CheckpointError(f"{self._weights}: a tensor of {self._shape} {self._kind} has {self._size} bytes")
        with self._weights.open("rb") as file:
            file.seek(self._offset)
            data = np.fromfile(file, np.uint8, self._size)
        if len(data) != self._size:
            raise CheckpointError(f"{self._weights}: is truncated; copy the whole directory again")
        return torch.from_numpy(data).view(kind).reshape(self._shape).float()


class _Scaled:
    """A bias that the graph holds multiplied with a number."""

    def __init__(self, read: _Reader, scale: _Reader) -> None:
        self._read, self._scale = read, scale

    def __call__(self) -> Tensor:
        return self._read() / self._scale().flatten()[0]


class _Graph:
    def __init__(self, root: ElementTree.Element, weights: Path) -> None:
        self._weights = weights
        self._layers = {layer.get("id", ""): layer for layer in root.iterfind("layers/layer")}
        self._out = defaultdict[str, list[tuple[str, str]]](list)
        self._in = defaultdict[str, list[str]](list)
        for edge in root.iterfind("edges/edge"):
            source, target = edge.get("from-layer", ""), edge.get("to-layer", "")
            self._out[source].append((target, edge.get("to-port", "")))
            self._in[target].append(source)

    def constants(self) -> Iterator[tuple[str, dict[str, str]]]:
        for layer in self._layers:
            if self._type(layer) == "Const":
                yield layer, self._data(layer)

    def reader(self, data: dict[str, str], shape: tuple[int, ...]) -> _Reader:
        return _Reader(self._weights, int(data["offset"]), int(data["size"]), data["element_type"], shape)

    def name(self, layer: str) -> str:
        return self._layers[layer].get("name", "")

    def uses(self, constant: str) -> Iterator[Use]:
        for layer, port in self._readers(constant):
            kind, scope = self._type(layer), self._scope(layer)
            if kind == "MatMul" and port == "1":
                yield Use(scope, "weight", self._data(layer).get("transpose_b", "false") not in ("true", "1"))
            elif kind in ("Convolution", "Gather", "Multiply"):
                yield Use(scope, "weight")
            elif kind == "Add":
                yield Use(scope, "bias")

    def scaled_biases(self, constant: str) -> Iterator[tuple[str, _Reader]]:
        """Where (x W + b) s was written as x W s + b s: the scope of W, and the constant s.

        OpenVINO does so to the scaled queries of an attention.
        """
        for layer, _ in self._readers(constant):
            if self._type(layer) != "Add":
                continue
            for product in (p for p in self._in[layer] if self._type(p) == "Multiply"):
                factors = [self._unconverted(factor) for factor in self._in[product]]
                scales = [f for f in factors if self._type(f) == "Const"]
                for matmul in (f for f in factors if self._type(f) == "MatMul"):
                    if len(scales) == 1 and _count(self._data(scales[0])) == 1:
                        yield self._scope(matmul), self.reader(self._data(scales[0]), (1,))

    def _readers(self, layer: str) -> Iterator[tuple[str, str]]:
        """Who reads a layer's output, through changes of precision."""
        for reader, port in self._out[layer]:
            if self._type(reader) == "Convert":
                yield from self._readers(reader)
            else:
                yield reader, port

    def _unconverted(self, layer: str) -> str:
        return self._in[layer][0] if self._type(layer) == "Convert" and self._in[layer] else layer

    def _scope(self, layer: str) -> str:
        return self.name(layer).partition("/")[0].removeprefix(_MODULE)

    def _type(self, layer: str) -> str:
        return self._layers[layer].get("type", "")

    def _data(self, layer: str) -> dict[str, str]:
        data = self._layers[layer].find("data")
        return {} if data is None else dict(data.attrib)


def _count(data: dict[str, str]) -> int:
    return math.prod(int(n) for n in data.get("shape", "0").split(",") if n.strip())
