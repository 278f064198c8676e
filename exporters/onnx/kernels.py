"""What a transformer block is made of besides attention, in ONNX Runtime's fused and in standard operators."""

from __future__ import annotations

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import FLOAT, MS, Graph, int_tensor
from edgeomni.quantize.schemes import Packed, signed_codes


class FusedKernels:
    """ONNX Runtime's own operators (SkipSimplifiedLayerNormalization, MatMulNBits, QuickGelu)."""

    def __init__(self, graph: Graph, eps: float) -> None:
        self.graph, self.eps = graph, eps

    def norm(self, x: str, gain: F32, name: str) -> str:
        """RMSNorm (arXiv 1910.07467)."""
        return str(
            self.graph.op(
                "SimplifiedLayerNormalization",
                [x, self.graph.const(gain, name)],
                axis=-1,
                epsilon=self.eps,
                stash_type=1,
            )
        )

    def add_norm(self, x: str, residual: str, gain: F32, name: str) -> tuple[str, str]:
        """(RMSNorm(x + residual), x + residual)."""
        outputs = [self.graph.unique("normed"), "", "", self.graph.unique("residual")]
        self.graph.op(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.graph.const(gain, name)],
            outputs=outputs,
            domain=MS,
            epsilon=self.eps,
        )
        return outputs[0], outputs[3]

    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        return self.graph.linear(x, name, weight, bias)

    def silu(self, x: str) -> str:
        return str(self.graph.op("QuickGelu", [x], domain=MS, alpha=1.0))  # x * sigmoid(1 * x)


class PortableKernels:
    """Standard operators only; blocked weights by DequantizeLinear (INT4/INT8, symmetric)."""

    def __init__(self, graph: Graph, eps: float) -> None:
        self.graph, self.eps = graph, eps

    def norm(self, x: str, gain: F32, name: str) -> str:
        """RMSNorm (arXiv 1910.07467)."""
        return str(self.graph.op("RMSNormalization", [x, self.graph.const(gain, name)], axis=-1, epsilon=self.eps))

    def add_norm(self, x: str, residual: str, gain: F32, name: str) -> tuple[str, str]:
        """(RMSNorm(x + residual), x + residual)."""
        total = str(self.graph.op("Add", [x, residual]))
        return self.norm(total, gain, name), total

    def linear(self, x: str, name: str, weight: Packed, bias: F32 | None = None) -> str:
        if not weight.scheme.blocked:
            return self.graph.linear(x, name, weight, bias)
        y = self.graph.op("MatMul", [x, dequantized(self.graph, name, weight, rows_first=False)])
        if bias is None:
            return str(y)
        return str(self.graph.op("Add", [y, self.graph.const(np.ascontiguousarray(bias), f"{name}.bias")]))

    def silu(self, x: str) -> str:
        return str(self.graph.op("Swish", [x]))


def dequantized(graph: Graph, name: str, weight: Packed, *, rows_first: bool) -> str:
    """DequantizeLinear of a blocked weight: [n, k] with `rows_first`, else [k, n]. Blocks run along k."""
    assert weight.scales is not None
    codes, scales = signed_codes(weight), weight.scales
    if not rows_first:
        codes, scales = codes.T, scales.T
    inputs = [
        graph.const(int_tensor(codes, weight.scheme.bits), f"{name}.codes"),
        graph.const(np.ascontiguousarray(scales), f"{name}.scales"),
    ]
    return str(graph.op("DequantizeLinear", inputs, axis=1 if rows_first else 0, block_size=weight.scheme.block))


def rows_linear(graph: Graph, x: str, name: str, weight: Packed, portable: bool) -> str:
    """x [1, 1, k] @ weight.T -> [1, 1, n], the weight stored as rows [n, k], so that one row can be read alone."""
    n, k = len(weight.data), weight.k
    if weight.scheme.blocked and not portable:
        return graph.linear(x, name, weight)
    if weight.scheme.blocked:
        rows = dequantized(graph, name, weight, rows_first=True)
    else:
        rows = graph.const(weight.data, f"{name}.codes")
        if weight.scheme.kind == "fp16":
            rows = graph.op("Cast", [rows], to=FLOAT)
    y = graph.op("Gemm", [graph.op("Reshape", [x, graph.ints(1, k)]), rows], transB=1)
    return str(graph.op("Reshape", [y, graph.ints(1, 1, n)]))
