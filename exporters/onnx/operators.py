"""The two sets of operators that graphs are made of: ONNX Runtime's fused ones, and standard ones.

Every builder (encoder, body, heads, codec) gets one of them from `operators_for` and never asks which it is.
Attention with a KV cache has its own pair in attention.py, because the fused one takes certain head sizes only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from edgeomni.arrays import F32
from edgeomni.errors import ExportError
from edgeomni.exporters.onnx import sine
from edgeomni.exporters.onnx.graph import FLOAT, MS, Graph, int_tensor
from edgeomni.exporters.onnx.options import Flavour
from edgeomni.quantize.schemes import Packed, signed_codes

BLOCKED = ("int4", "int8")
"""Scheme kinds with one scale per block of inputs."""


class Operators(ABC):
    """What both sets have in common: float linear layers, convolutions, and norms that add their input first."""

    opset: ClassVar[int]
    takes_wanted: ClassVar[bool]
    """Whether the encoder's graph gets the number of wanted features as an input."""
    snake_period: ClassVar[float]
    """The period of `snake`'s squared sine."""
    snake_gain: ClassVar[float]
    """What the result of `snake` stands for is this many times its value, divided by alpha."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @abstractmethod
    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        """x [.., k] @ weight.T [k, n] (+ bias [n]) -> [.., n]."""

    @abstractmethod
    def rows_linear(self, x: str, name: str, weight: Packed) -> str:
        """x [1, 1, k] @ weight.T -> [1, 1, n], the weight stored as rows [n, k], so that one row can be read alone."""

    @abstractmethod
    def rms_norm(self, x: str, gain: F32, name: str, eps: float) -> str:
        """RMSNorm (arXiv 1910.07467) over the last axis; `name` is the gain's."""

    @abstractmethod
    def add_rms_norm(self, x: str, residual: str, gain: F32, name: str, eps: float) -> tuple[str, str]:
        """(RMSNorm(x + residual), x + residual)."""

    @abstractmethod
    def silu(self, x: str) -> str:
        """x * sigmoid(x)."""

    @abstractmethod
    def gelu(self, x: str) -> str:
        """x * Phi(x), by the error function."""

    @abstractmethod
    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        """Bidirectional attention of [B, S, heads * head_dim] each, without a cache."""

    @abstractmethod
    def depthwise_kernel(self, weight: F32) -> F32:
        """A depthwise convolution's weight [channels, 1, k] in the shape that `depthwise_conv` takes."""

    @abstractmethod
    def depthwise_conv(self, x: str, weight: Sequence[str], groups: int, dilation: int) -> str:
        """As `conv`, where groups = channels."""

    @abstractmethod
    def snake(self, u: str) -> str:
        """u + sin^2(u) with `snake_period` and divided by `snake_gain`: SNAC's activation but for constant factors."""

    def conv(self, x: str, weight: Sequence[str], groups: int, dilation: int) -> str:
        """Convolution of x [1, inputs, n] without padding. `weight`: the kernel and, where there is one, the bias."""
        return self.graph.op("Conv", [x, *weight], group=groups, dilations=[dilation])

    def _float_linear(self, x: str, name: str, weight: Packed, bias: F32 | None) -> str:
        b = self._bias(name, bias)
        w = self._float(f"{name}.weight", weight, np.ascontiguousarray(weight.data.T))
        y = self.graph.op("MatMul", [x, w])
        return self.graph.op("Add", [y, *b]) if b else y

    def _float_rows_linear(self, x: str, name: str, weight: Packed) -> str:
        return self._gemm(x, self._float(f"{name}.codes", weight, weight.data), weight)

    def _float(self, name: str, weight: Packed, values: F32) -> str:
        """A constant in float32; half-precision weights are cast at run time, which is what a CPU does anyway."""
        if weight.scheme.kind not in ("fp32", "fp16"):
            raise ExportError(f"{name}: no ONNX operator takes {weight.scheme} weights; choose another precision")
        stored = self.graph.const(values, name)
        return self.graph.op("Cast", [stored], to=FLOAT) if weight.scheme.kind == "fp16" else stored

    def _gemm(self, x: str, rows: str, weight: Packed) -> str:
        g = self.graph
        y = g.op("Gemm", [g.op("Reshape", [x, g.ints(1, weight.k)]), rows], transB=1)
        return g.op("Reshape", [y, g.ints(1, 1, len(weight.data))])

    def _bias(self, name: str, bias: F32 | None) -> list[str]:
        return [] if bias is None else [self.graph.floats(f"{name}.bias", bias)]


class FusedOperators(Operators):
    """ONNX Runtime's own operators, in the form that its CPU provider computes fastest."""

    opset = 21
    takes_wanted = True
    snake_period = math.pi
    snake_gain = sine.LEAD**2

    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        if weight.scheme.kind in BLOCKED:
            return self._matmul_n_bits(x, name, weight, bias)
        if weight.scheme.kind == "int8_dynamic":
            return self._dynamic_matmul(x, name, weight, bias)
        return self._float_linear(x, name, weight, bias)

    def rows_linear(self, x: str, name: str, weight: Packed) -> str:
        if weight.scheme.kind in BLOCKED:  # MatMulNBits stores rows in any case
            return self._matmul_n_bits(x, name, weight, None)
        return self._float_rows_linear(x, name, weight)

    def rms_norm(self, x: str, gain: F32, name: str, eps: float) -> str:
        inputs = [x, self.graph.const(gain, name)]
        return self.graph.op("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=eps, stash_type=1)

    def add_rms_norm(self, x: str, residual: str, gain: F32, name: str, eps: float) -> tuple[str, str]:
        g = self.graph
        outputs = [g.unique("normed"), "", "", g.unique("residual")]
        inputs = [x, residual, g.const(gain, name)]
        g.ops("SkipSimplifiedLayerNormalization", inputs, outputs, domain=MS, epsilon=eps)
        return outputs[0], outputs[3]

    def silu(self, x: str) -> str:
        return self.graph.op("QuickGelu", [x], domain=MS, alpha=1.0)  # x * sigmoid(alpha * x)

    def gelu(self, x: str) -> str:
        return self.graph.op("Gelu", [x], domain=MS)

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        return self.graph.op("MultiHeadAttention", [query, key, value], domain=MS, num_heads=heads)

    def depthwise_kernel(self, weight: F32) -> F32:
        return weight[:, :, None]

    def depthwise_conv(self, x: str, weight: Sequence[str], groups: int, dilation: int) -> str:
        """Computed in two dimensions, because ONNX Runtime's blocked kernels know no convolution in one."""
        g = self.graph
        y = g.op("Conv", [g.op("Unsqueeze", [x, g.ints(2)]), *weight], group=groups, dilations=[1, dilation])
        return g.op("Squeeze", [y, g.ints(2)])

    def snake(self, u: str) -> str:
        g, root = self.graph, sine.monic_sine(self.graph, u)
        square = g.op("Mul", [root, root])
        linear = g.op("Mul", [u, g.floats("snake.linear", math.pi / self.snake_gain)])
        return g.op("Add", [linear, square])

    def _matmul_n_bits(self, x: str, name: str, weight: Packed, bias: F32 | None) -> str:
        assert weight.scales is not None
        g, b = self.graph, self._bias(name, bias)
        inputs = [x, g.const(weight.data, f"{name}.codes"), g.const(weight.scales, f"{name}.scales")]
        inputs += ["", "", *b] if b else []
        n, scheme = len(weight.data), weight.scheme
        return g.op(
            "MatMulNBits",
            inputs,
            domain=MS,
            K=weight.k,
            N=n,
            bits=int(scheme.bits),
            block_size=scheme.block,
            accuracy_level=4,
        )

    def _dynamic_matmul(self, x: str, name: str, weight: Packed, bias: F32 | None) -> str:
        assert weight.scales is not None
        g, b = self.graph, self._bias(name, bias)
        codes = g.const(np.ascontiguousarray(weight.data.T), f"{name}.codes")
        scales = g.const(weight.scales, f"{name}.scales")
        zeros = g.const(np.zeros(len(weight.data), np.int8), f"{name}.zero_points")
        return g.op("DynamicQuantizeMatMul", [x, codes, scales, zeros, *b], domain=MS)


class PortableOperators(Operators):
    """Standard operators only; integer weights become floats by DequantizeLinear (symmetric)."""

    opset = 24
    takes_wanted = False
    snake_period = 1.0
    snake_gain = 1.0

    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        if weight.scheme.kind in BLOCKED:
            w = self._dequantized_blocks(name, weight, rows_first=False)
        elif weight.scheme.kind == "int8_dynamic":
            w = self._dequantized_channels(name, weight)
        else:
            return self._float_linear(x, name, weight, bias)
        y = self.graph.op("MatMul", [x, w])
        return y if bias is None else self.graph.op("Add", [y, *self._bias(name, bias)])

    def rows_linear(self, x: str, name: str, weight: Packed) -> str:
        if weight.scheme.kind in BLOCKED:
            return self._gemm(x, self._dequantized_blocks(name, weight, rows_first=True), weight)
        return self._float_rows_linear(x, name, weight)

    def rms_norm(self, x: str, gain: F32, name: str, eps: float) -> str:
        return self.graph.op("RMSNormalization", [x, self.graph.const(gain, name)], axis=-1, epsilon=eps)

    def add_rms_norm(self, x: str, residual: str, gain: F32, name: str, eps: float) -> tuple[str, str]:
        total = self.graph.op("Add", [x, residual])
        return self.rms_norm(total, gain, name, eps), total

    def silu(self, x: str) -> str:
        return self.graph.op("Swish", [x])

    def gelu(self, x: str) -> str:
        return self.graph.op("Gelu", [x])

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        return self.graph.op("Attention", [query, key, value], q_num_heads=heads, kv_num_heads=heads)

    def depthwise_kernel(self, weight: F32) -> F32:
        return weight

    def depthwise_conv(self, x: str, weight: Sequence[str], groups: int, dilation: int) -> str:
        return self.conv(x, weight, groups, dilation)

    def snake(self, u: str) -> str:
        root = self.graph.op("Sin", [u])
        return self.graph.op("Add", [u, self.graph.op("Mul", [root, root])])

    def _dequantized_blocks(self, name: str, weight: Packed, *, rows_first: bool) -> str:
        """A blocked weight as floats: [n, k] with `rows_first`, else [k, n]. Blocks run along k."""
        assert weight.scales is not None
        g, codes, scales = self.graph, signed_codes(weight), weight.scales
        if not rows_first:
            codes, scales = codes.T, scales.T
        inputs = [
            g.const(int_tensor(codes, int(weight.scheme.bits)), f"{name}.codes"),
            g.const(np.ascontiguousarray(scales), f"{name}.scales"),
        ]
        return g.op("DequantizeLinear", inputs, axis=1 if rows_first else 0, block_size=weight.scheme.block)

    def _dequantized_channels(self, name: str, weight: Packed) -> str:
        """A weight with one scale per output channel as floats [k, n]."""
        assert weight.scales is not None
        codes = self.graph.const(np.ascontiguousarray(weight.data.T), f"{name}.codes")
        return self.graph.op("DequantizeLinear", [codes, self.graph.const(weight.scales, f"{name}.scales")], axis=1)


_OF_FLAVOUR: dict[Flavour, type[Operators]] = {"ort": FusedOperators, "portable": PortableOperators}


def operators_for(flavour: Flavour, name: str, opset: int | None = None) -> Operators:
    """The flavour's operators, on a new graph of that name. `opset` replaces the one that the set needs at most."""
    kind = _OF_FLAVOUR[flavour]
    return kind(Graph(name, opset or kind.opset))
