"""The operators that TensorRT's parser takes, strongly typed: products in a narrow type, all else in float32.

TensorRT builds what the graph's types say. Residuals, norms, rotation and activations stay float32, where half would
overflow or lose the small one of two terms; their cost is nothing beside the weights that a frame reads. Products take
their inputs in half precision (or bfloat16) and give their result back as float32. With fp32 weights everything is
float32. Static weights (int8_static, fp8_static) round their inputs to the weights' type as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import BFLOAT16, FLOAT, FLOAT4, FLOAT8, Graph, int_tensor, raw_tensor
from edgeomni.exporters.onnx.operators import PortableOperators
from edgeomni.exporters.onnx.weights import packed_parts
from edgeomni.quantize.schemes import Packed, signed_codes
from edgeomni.quantize.small_floats import bfloat16_bits, e4m3_bits
from edgeomni.quantize.tensorrt_kinds import NVFP4_UNIT, STATIC, nvfp4_codes

OPSET = 24


class TensorRtOperators(PortableOperators):
    """Standard operators; see the module.

    `compute`: the type that products, convolutions and attention compute in. `inputs`: the model's linear layer -> the
    scale of its inputs, for static weights.
    """

    def __init__(self, graph: Graph, *, compute: int, inputs: Mapping[str, float] | None = None) -> None:
        super().__init__(graph)
        self.compute, self._inputs = compute, inputs or {}

    @property
    def narrow(self) -> bool:
        """Whether products compute in less than float32."""
        return self.compute != FLOAT

    def to_narrow(self, x: str) -> str:
        return self.graph.op("Cast", [x], to=self.compute) if self.narrow else x

    def to_float(self, x: str) -> str:
        return self.graph.op("Cast", [x], to=FLOAT) if self.narrow else x

    def stored(self, value: F32, name: str) -> str:
        """A constant in the type that products compute in."""
        return self.graph.const(self._typed(value), name)

    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        narrow = self.to_narrow(x)
        if weight.scheme.kind in STATIC:
            narrow = self._rounded(narrow, name, weight)
        y = self.to_float(self.graph.op("MatMul", [narrow, self._matrix(name, weight)]))
        return y if bias is None else self.graph.op("Add", [y, self.graph.floats(f"{name}.bias", bias)])

    def rows_linear(self, x: str, name: str, weight: Packed) -> str:
        if weight.scales is None:
            rows = self.graph.const(self._floats(weight), f"{name}.codes")
        else:
            rows = self._dequantized(name, weight, rows_first=True)
        g = self.graph
        flat = g.op("Reshape", [self.to_narrow(x), g.ints(1, weight.k)])
        y = self.to_float(g.op("Gemm", [flat, rows], transB=1))
        return g.op("Reshape", [y, g.ints(1, 1, len(weight.data))])

    def conv(self, x: str, weight: Sequence[str], groups: int, dilation: int) -> str:
        if not self.narrow:  # TensorRT fails to fuse a bias that is added behind a convolution in float32
            return super().conv(x, weight, groups, dilation)
        y = self.graph.op("Conv", [self.to_narrow(x), weight[0]], group=groups, dilations=[dilation])
        y = self.to_float(y)
        if len(weight) == 1:
            return y
        bias = self.graph.op("Reshape", [weight[1], self.graph.ints(1, -1, 1)])
        return self.graph.op("Add", [y, bias])

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        """In four dimensions: TensorRT-RTX takes three as well, plain TensorRT 10.15 by its documents four only."""
        g = self.graph
        split = [g.op("Reshape", [self.to_narrow(part), g.ints(0, 0, heads, -1)]) for part in (query, key, value)]
        q, k, v = (g.op("Transpose", [part], perm=[0, 2, 1, 3]) for part in split)
        if self.narrow:
            return self._joined(self.to_float(g.op("Attention", [q, k, v])))
        return self._joined(self.softmax_attention(q, k, v, None))

    def silu(self, x: str) -> str:
        """Plain TensorRT 10.15 does not list the operator Swish."""
        return self.graph.op("Mul", [x, self.graph.op("Sigmoid", [x])])

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
        if weight.scheme.kind in STATIC:
            return self._per_channel(name, weight)
        if weight.scheme.kind == "nvfp4":
            return self._nvfp4(name, weight)
        if weight.scales is not None:
            return self._dequantized(name, weight, rows_first=False)
        return self.graph.const(self._floats(weight, transposed=True), f"{name}.weight")

    def _floats(self, weight: Packed, *, transposed: bool = False) -> Any:
        """A float weight's constant, [n, k] or `transposed`."""
        data = weight.data
        if self.compute == BFLOAT16:
            data = data.view(np.uint16).reshape(len(data), weight.k)
        data = data.T if transposed else data
        if self.compute == BFLOAT16:
            return raw_tensor(BFLOAT16, data.shape, data)
        return np.ascontiguousarray(data)

    def _typed(self, value: Any) -> Any:
        """A constant in the type that products compute in."""
        array = np.asarray(value, np.float32)
        if self.compute == BFLOAT16:
            return raw_tensor(BFLOAT16, array.shape, bfloat16_bits(array))
        return np.ascontiguousarray(array, np.float16 if self.narrow else np.float32).reshape(array.shape)

    def _rounded(self, x: str, name: str, weight: Packed) -> str:
        """x rounded to the type of a static weight, with one scale that calibration has measured."""
        g, first = self.graph, packed_parts(name)[0]
        scale = g.const(self._typed(self._inputs[first]), f"{name}.input_scale")
        if weight.scheme.kind == "fp8_static":
            zero = g.const(raw_tensor(FLOAT8, [], e4m3_bits(np.zeros(1, np.float32))), "zero.float8")
        else:
            zero = g.const(np.zeros((), np.int8), "zero.int8")
        return g.op("DequantizeLinear", [g.op("QuantizeLinear", [x, scale, zero]), scale, zero])

    def _per_channel(self, name: str, weight: Packed) -> str:
        """A weight with one scale per output, [k, n]."""
        g, codes = self.graph, np.ascontiguousarray(weight.data.T)
        data = raw_tensor(FLOAT8, codes.shape, codes) if weight.scheme.kind == "fp8_static" else codes
        inputs = [g.const(data, f"{name}.codes"), g.const(self._typed(weight.scales), f"{name}.scales")]
        return g.op("DequantizeLinear", inputs, axis=1)

    def _nvfp4(self, name: str, weight: Packed) -> str:
        """A weight in E2M1, [k, n]: its blocks' scales are E4M3 in units of one float32 scale."""
        assert weight.scales is not None
        g, codes = self.graph, nvfp4_codes(weight).T.reshape(-1)
        scales = np.ascontiguousarray(e4m3_bits(weight.scales / np.float32(NVFP4_UNIT)).T)
        packed = raw_tensor(FLOAT4, [weight.k, len(weight.data)], codes[0::2] | (codes[1::2] << np.uint8(4)))
        stored = g.const(raw_tensor(FLOAT8, scales.shape, scales), f"{name}.scales")
        unit = g.const(np.array(NVFP4_UNIT, np.float32), "nvfp4.unit")
        blocks = [g.const(packed, f"{name}.codes"), g.op("DequantizeLinear", [stored, unit])]
        return self.to_narrow(g.op("DequantizeLinear", blocks, axis=0, block_size=weight.scheme.block))

    def _dequantized(self, name: str, weight: Packed, *, rows_first: bool) -> str:
        """A blocked weight, [n, k] with `rows_first`, else [k, n]; blocks run along k, scales are half."""
        assert weight.scales is not None
        floats, scales = weight.scheme.kind == "fp8", weight.scales.astype(np.float16)
        codes = weight.data.reshape(len(weight.data), weight.k) if floats else signed_codes(weight)
        if not rows_first:
            codes, scales = codes.T, scales.T
        stored = raw_tensor(FLOAT8, codes.shape, codes) if floats else int_tensor(codes, int(weight.scheme.bits))
        inputs = [
            self.graph.const(stored, f"{name}.codes"),
            self.graph.const(np.ascontiguousarray(scales), f"{name}.scales"),
        ]
        axis = 1 if rows_first else 0
        return self.graph.op("DequantizeLinear", inputs, axis=axis, block_size=weight.scheme.block)
