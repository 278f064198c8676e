"""A small builder of OpenVINO models: named constants, compressed weights, and the operators of the speech models.

Every tensor that comes from the checkpoint is a Constant under a name of our own, which survives in the written file
(files.py), so that it can be re-read and compared. Weights are rows [n, k], multiplied by MatMul with transpose_b;
codes become floats by Convert, Multiply and, where scales belong to blocks, Reshape. OpenVINO's plugins recognise that
form and multiply with the codes themselves ("weights compression" in their documentation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.openvino_library import ov
from edgeomni.quantize.schemes import Packed, signed_codes

ops = ov.opset13
Value = Any
"""An OpenVINO node of one output, or an output of a node."""
END = 2**31 - 1


class Graph:
    """Collects inputs, outputs, states' assignments and constants of one model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._sinks: list[Value] = []
        self._constants: dict[str, Value] = {}

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int]) -> Value:
        """A model input; -1 stands for a dimension that varies."""
        node = ops.parameter(list(shape), dtype, name=name)
        node.output(0).get_tensor().set_names({name})
        self._inputs.append(node)
        return node

    def output(self, name: str, value: Value) -> None:
        node = ops.result(value, name=name)
        node.output(0).get_tensor().set_names({name})
        self._outputs.append(node)

    def state(self, name: str, initial: Value, shape: Sequence[int]) -> Value:
        """The value that `assign` gave to the state in the last run, `initial` after a reset. float32."""
        return ops.read_value(initial, name, np.float32, list(shape))

    def assign(self, name: str, value: Value) -> None:
        self._sinks.append(ops.assign(value, name))

    def model(self) -> Any:
        return ov.Model(self._outputs, self._sinks, self._inputs, self.name)

    def const(self, value: NDArray[Any], name: str) -> Value:
        """A constant of the array's own type and shape; a name given twice means the same value."""
        if name not in self._constants:
            self._constants[name] = ops.constant(np.ascontiguousarray(value), name=name)
        return self._constants[name]

    def ints(self, *values: int) -> Value:
        """A constant int64 [n]."""
        return self.const(np.array(values, np.int64), "ints_" + "_".join(str(v).replace("-", "m") for v in values))

    def number(self, value: float) -> Value:
        """A constant float32 without dimensions."""
        return self.const(np.array(value, np.float32), f"number_{value!r}")

    def weight(self, name: str, packed: Packed) -> Value:
        """A packed weight as floats [n, k]; its constants are `name`.weight, or `name`.codes and `name`.scales."""
        if packed.scales is None:
            stored = self.const(packed.data, f"{name}.weight")
            return stored if packed.data.dtype == np.float32 else ops.convert(stored, "f32")
        n, per_row = len(packed.data), packed.scales.reshape(len(packed.data), -1).shape[1]
        shape = [n, packed.k] if per_row == 1 else [n, per_row, packed.k // per_row]
        codes = self._codes(f"{name}.codes", stored_codes(packed), int(packed.scheme.bits), shape)
        scales = self.const(packed.scales.reshape([n, 1] if per_row == 1 else [n, per_row, 1]), f"{name}.scales")
        floats = ops.multiply(ops.convert(codes, "f32"), scales)
        return floats if per_row == 1 else ops.reshape(floats, self.ints(n, packed.k), False)

    def linear(self, x: Value, name: str, packed: Packed, bias: F32 | None = None) -> Value:
        """x [.., k] @ weight.T (+ bias) -> [.., n]."""
        y = ops.matmul(x, self.weight(name, packed), False, True)
        return y if bias is None else ops.add(y, self.const(bias.reshape(1, 1, -1), f"{name}.bias"))

    def rms_norm(self, x: Value, gain: F32, name: str, eps: float) -> Value:
        """RMSNorm (arXiv 1910.07467) over the last axis, in the form that OpenVINO's RMSFusion takes."""
        mean = ops.reduce_mean(ops.power(x, self.number(2)), self.ints(-1), True)
        root = ops.sqrt(ops.add(mean, self.number(eps)))
        normed = ops.multiply(x, ops.divide(self.number(1), root))
        return ops.multiply(normed, self.const(gain, name))

    def layer_norm(self, x: Value, gain: F32, bias: F32, name: str, eps: float) -> Value:
        normed = ops.mvn(x, self.ints(-1), True, eps, "inside_sqrt")
        scaled = ops.multiply(normed, self.const(gain, f"{name}.weight"))
        return ops.add(scaled, self.const(bias, f"{name}.bias"))

    def heads(self, x: Value, count: int, head_dim: int) -> Value:
        """[B, S, count * head_dim] -> [B, count, S, head_dim]."""
        split = ops.reshape(x, self.ints(0, 0, count, head_dim), True)
        return ops.transpose(split, self.ints(0, 2, 1, 3))

    def joined(self, x: Value, width: int) -> Value:
        """[B, count, S, head_dim] -> [B, S, width]."""
        return ops.reshape(ops.transpose(x, self.ints(0, 2, 1, 3)), self.ints(0, 0, width), True)

    def split(self, x: Value, sizes: Sequence[int], axis: int) -> Sequence[Value]:
        """x cut along an axis into parts of these sizes."""
        return ops.variadic_split(x, self.number_int(axis), self.ints(*sizes)).outputs()

    def number_int(self, value: int) -> Value:
        """A constant int64 without dimensions."""
        return self.const(np.array(value, np.int64), f"int_{value}".replace("-", "m"))

    def slice(self, x: Value, start: Value, stop: Value, axis: int) -> Value:
        return ops.slice(x, start, stop, self.ints(1), self.ints(axis))

    def _codes(self, name: str, codes: NDArray[np.uint8], bits: int, shape: list[int]) -> Value:
        if name not in self._constants:
            kind = ov.Type.i4 if bits == 4 else ov.Type.i8
            tensor = ov.Tensor(codes.view(np.int8) if bits == 8 else codes, ov.Shape(shape), kind)
            node = ov.op.Constant(tensor, shared_memory=False)  # a tensor does not keep its array alive
            node.set_friendly_name(name)
            self._constants[name] = node
        return self._constants[name]


def stored_codes(packed: Packed) -> NDArray[np.uint8]:
    """Codes around 0 in two's complement, as the file holds them: int8, or int4 two to a byte, the low half first."""
    flat = np.ascontiguousarray(signed_codes(packed)).view(np.uint8).reshape(-1)
    if packed.scheme.bits == 8:
        return flat
    assert flat.size % 2 == 0, "blocks of 4-bit codes are of even size"
    return ((flat[0::2] & 15) | (flat[1::2] << 4)).astype(np.uint8, copy=False)
