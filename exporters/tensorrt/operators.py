"""The operators that TensorRT's parser takes, strongly typed: products in half precision, all else in float32.

TensorRT builds what the graph's types say. Residuals, norms, rotation and activations stay float32, where half would
overflow or lose the small one of two terms; their cost is nothing beside the weights that a frame reads. Products take
their inputs in half and give their result back as float32. With fp32 weights everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import FLOAT, FLOAT16, Graph, int_tensor
from edgeomni.exporters.onnx.operators import PortableOperators
from edgeomni.quantize.schemes import Packed, signed_codes

OPSET = 24


class TensorRtOperators(PortableOperators):
    """Standard operators; see the module. `half`: whether products, convolutions and attention compute in half."""

    def __init__(self, graph: Graph, *, half: bool) -> None:
        super().__init__(graph)
        self.half = half

    def to_half(self, x: str) -> str:
        return self.graph.op("Cast", [x], to=FLOAT16) if self.half else x

    def to_float(self, x: str) -> str:
        return self.graph.op("Cast", [x], to=FLOAT) if self.half else x

    def stored(self, value: F32, name: str) -> str:
        """A constant in the type that products compute in."""
        return self.graph.const(np.ascontiguousarray(value, np.float16 if self.half else np.float32), name)

    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        y = self.to_float(self.graph.op("MatMul", [self.to_half(x), self._matrix(name, weight)]))
        return y if bias is None else self.graph.op("Add", [y, self.graph.floats(f"{name}.bias", bias)])

    def rows_linear(self, x: str, name: str, weight: Packed) -> str:
        if weight.scales is None:
            rows = self.graph.const(weight.data, f"{name}.codes")
        else:
            rows = self._dequantized(name, weight, rows_first=True)
        g = self.graph
        flat = g.op("Reshape", [self.to_half(x), g.ints(1, weight.k)])
        y = self.to_float(g.op("Gemm", [flat, rows], transB=1))
        return g.op("Reshape", [y, g.ints(1, 1, len(weight.data))])

    def conv(self, x: str, weight: Sequence[str], groups: int, dilation: int) -> str:
        if not self.half:  # TensorRT fails to fuse a bias that is added behind a convolution in float32
            return super().conv(x, weight, groups, dilation)
        y = self.graph.op("Conv", [self.to_half(x), weight[0]], group=groups, dilations=[dilation])
        y = self.to_float(y)
        if len(weight) == 1:
            return y
        bias = self.graph.op("Reshape", [weight[1], self.graph.ints(1, -1, 1)])
        return self.graph.op("Add", [y, bias])

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        g = self.graph
        if self.half:
            q, k, v = (self.to_half(part) for part in (query, key, value))
            return self.to_float(g.op("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads))
        split = [g.op("Reshape", [part, g.ints(0, 0, heads, -1)]) for part in (query, key, value)]
        q, k, v = (g.op("Transpose", [part], perm=[0, 2, 1, 3]) for part in split)
        return self._joined(self.softmax_attention(q, k, v, None))

    def softmax_attention(self, q: str, k: str, v: str, mask: str | None) -> str:
        """Attention by products and softmax, of [.., S, head] queries and [.., M, head] keys.

        TensorRT's parser refuses the operator Attention in float32. The scale 1 / sqrt(head) is taken from the query's
        shape, so that the caller need not tell the heads' size.
        """
        g = self.graph
        size = g.op("Cast", [g.op("Shape", [q], start=-1)], to=FLOAT)
        scaled = g.op("Div", [q, g.op("Sqrt", [size])])
        scores = g.op("MatMul", [scaled, self._swapped(k)])
        if mask is not None:
            scores = g.op("Add", [scores, mask])
        return g.op("MatMul", [g.op("Softmax", [scores], axis=-1), v])

    def _swapped(self, x: str) -> str:
        """[B, heads, M, head] -> [B, heads, head, M]."""
        return self.graph.op("Transpose", [x], perm=[0, 1, 3, 2])

    def _joined(self, x: str) -> str:
        """[B, heads, S, head] -> [B, S, heads * head]."""
        return self.graph.op("Reshape", [self.graph.op("Transpose", [x], perm=[0, 2, 1, 3]), self.graph.ints(0, 0, -1)])

    def _matrix(self, name: str, weight: Packed) -> str:
        """A weight as [k, n], in the type that products compute in."""
        if weight.scales is not None:
            return self._dequantized(name, weight, rows_first=False)
        return self.graph.const(np.ascontiguousarray(weight.data.T), f"{name}.weight")

    def _dequantized(self, name: str, weight: Packed, *, rows_first: bool) -> str:
        """A blocked weight, [n, k] with `rows_first`, else [k, n]; blocks run along k, scales are half."""
        assert weight.scales is not None
        codes, scales = signed_codes(weight), weight.scales.astype(np.float16)
        if not rows_first:
            codes, scales = codes.T, scales.T
        inputs = [
            self.graph.const(int_tensor(codes, int(weight.scheme.bits)), f"{name}.codes"),
            self.graph.const(np.ascontiguousarray(scales), f"{name}.scales"),
        ]
        axis = 1 if rows_first else 0
        return self.graph.op("DequantizeLinear", inputs, axis=axis, block_size=weight.scheme.block)
