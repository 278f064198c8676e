"""Codec decoder -> one ONNX graph that is fed piece by piece: ids and states in, samples and next states out.

All lengths are dynamic, so that the same graph serves a stream's start, middle and end. Inputs:
    codes.<level>          int64 [ids]
    state.<layer>          what the layer kept; at first as long as `meta["states"]` says, zeros
    tail.<channels>x<n>    zeros [1, channels, n], or [1, channels, 0] but at the end: the layers' right padding
    start.<layer>, stop.<layer>, skip.<n>   int64 [1]: what to cut off at the stream's start or end (`meta["bounds"]`)
    noise.<block>          [1, 1, samples at that block], or [1, 1, 0] for off, which then costs nothing
Outputs: wave [1, 1, samples], next.<layer>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx import codec_attention, snake
from edgeomni.exporters.onnx.codec_attention import END
from edgeomni.exporters.onnx.graph import FLOAT, INT64, Graph, signature
from edgeomni.model import codec_plan as ops
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import read_plan
from edgeomni.quantize.policy import schemes_for

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

Floats = NDArray[np.floating[Any]]


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, flavour: str, block: int | None) -> Component:
    """Writes out_dir/codec.onnx and its data; what runtimes/ort_codec.py needs to know of it goes into `meta`."""
    schemes = schemes_for("codec", precision, block)
    decoder = read_plan(model.codec, model.spec.codec)
    builder = CodecGraph(decoder, fused=flavour == "ort", half=schemes["codec"].kind == "fp16")
    files = builder.build().save(out_dir / "codec.onnx")
    path = files[0].relative_to(root).as_posix()
    return Component(
        name="codec",
        engine="onnxruntime",
        format="onnx",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"codec": GraphEntry(path, *signature(files[0]))},
        meta={"flavour": flavour, **builder.meta()},
        files=describe_files(root, files),
    )


@dataclass(frozen=True)
class Signal:
    """A value [1, channels, samples] of the graph; what it stands for is gain [channels] times it."""

    value: str
    gain: F32

    @property
    def channels(self) -> int:
        return len(self.gain)


class CodecGraph:
    """Builds the graph of a layer program.

    `fused` builds for ONNX Runtime's CPU kernels, otherwise plain operators; `half` stores weights in half.
    Gains between layers (1 / alpha of the snakes) are folded into the neighbouring weights.
    """

    def __init__(self, decoder: CodecPlan, *, fused: bool, half: bool) -> None:
        self.plan, self.fused, self.half = decoder, fused, half
        self.graph = Graph("codec")
        self._states: list[dict[str, Any]] = []
        self._tails: dict[str, dict[str, Any]] = {}
        self._bounds: dict[str, dict[str, Any]] = {}
        self._emit = {
            ops.Conv: self._conv,
            ops.Up: self._up,
            ops.Residual: self._residual,
            ops.Noise: self._noise,
            ops.Snake: lambda op, x, _: snake.emit(self, op, x),
            ops.Elu: lambda _, x, __: self._pointwise("Elu", x),
            ops.Tanh: lambda _, x, __: self._pointwise("Tanh", x),
            ops.LocalAttention: lambda op, x, _: codec_attention.local(self, op, x),
            ops.Transformer: lambda op, x, _: codec_attention.transformer(self, op, x),
        }

    def build(self) -> Graph:
        x = self._lookup(self.plan.ops[0])  # type: ignore[arg-type]
        wave = self._run(self.plan.ops[1:], x, None)
        self.graph.output("wave", FLOAT, [1, 1, "samples"], self.natural(wave))
        return self.graph

    def meta(self) -> dict[str, Any]:
        """What the adapter needs; valid after build()."""
        return {
            "first_push": self.plan.first_push,
            "push_multiple": self.plan.push_multiple,
            "lag_samples": self.plan.lag_samples,
            "states": self._states,
            "tails": list(self._tails.values()),
            "bounds": list(self._bounds.values()),
            "noise": [asdict(pace) for pace in self.plan.noise_paces],
        }

    def _run(self, layers: Sequence[ops.Op], x: Signal, gain: F32 | None) -> Signal:
        """The layers one after another; `gain` is what the last one should put out with, if it can choose."""
        for i, op in enumerate(layers):
            rest = layers[i + 1 :]
            x = self._emit[type(op)](op, x, snake.wanted_gain(self, rest) if rest else gain)  # type: ignore[operator]
        return x

    def weight(self, name: str, value: F32, gain_in: Floats | None = None, gain_out: Floats | None = None) -> str:
        """Constant `value`, rows (axis 0) multiplied by gain_in, last axis divided by gain_out.

        In half the stored value stays as it is, and the gains follow in float: they may exceed half's range.
        """
        factors: list[Floats] = []
        if gain_in is not None:
            factors.append(gain_in.reshape(-1, *[1] * (value.ndim - 1)))
        if gain_out is not None:
            factors.append(1 / gain_out)
        if not self.half:
            folded = math.prod(factors, start=value)
            return self.graph.const(np.ascontiguousarray(folded, np.float32), name)
        stored = self.graph.const(np.ascontiguousarray(value, np.float16), name)
        y = self.graph.op("Cast", [stored], to=FLOAT)
        for i, factor in enumerate(factors):
            y = self.graph.op("Mul", [y, self.graph.const(factor.astype(np.float32), f"{name}.gain{i}")])
        return str(y)

    def const(self, name: str, value: Any) -> str:
        return self.graph.const(np.ascontiguousarray(value, np.float32), name)

    def state(self, name: str, shape: Sequence[int], dynamic: int, dtype: int = FLOAT) -> str:
        """Input state.<name>, whose initial `shape` grows along axis `dynamic`."""
        kind = {FLOAT: "float32", INT64: "int64"}[dtype]
        self._states.append({"name": name, "shape": list(shape), "dtype": kind})
        dims: list[int | str] = list(shape)
        if dtype == FLOAT:
            dims[dynamic] = f"kept.{name}"
        return self.graph.input(f"state.{name}", dtype, dims)

    def keep(self, name: str, value: str, shape: Sequence[int | str], dtype: int = FLOAT) -> None:
        """Declares `value` as the next push's state.<name>."""
        self.graph.output(f"next.{name}", dtype, list(shape), value)

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        g = self.graph
        return str(g.op("Slice", [x, g.ints(start), g.ints(stop), g.ints(axis)]))

    def natural(self, x: Signal) -> str:
        """The signal's value with its gain applied."""
        if np.all(x.gain == 1):
            return x.value
        gain = self.graph.const(x.gain[:, None].astype(np.float32))
        return str(self.graph.op("Mul", [x.value, gain]))

    def _lookup(self, op: ops.Lookup) -> Signal:
        g, groups = self.graph, dict[int, str]()
        for level, (table, stride, group) in enumerate(zip(op.tables, op.strides, op.groups, strict=True)):
            ids = g.input(f"codes.{level}", INT64, [f"ids{level}"])
            if stride > 1:
                held = g.op("Expand", [g.op("Unsqueeze", [ids, g.ints(1)]), g.ints(1, stride)])
                ids = g.op("Reshape", [held, g.ints(-1)])
            stored = g.const(table.astype(np.float16 if self.half else np.float32), f"{op.name}.{level}")
            rows = g.op("Gather", [stored, ids])
            if self.half:
                rows = g.op("Cast", [rows], to=FLOAT)
            groups[group] = g.op("Add", [groups[group], rows]) if group in groups else rows
        rows = g.op("Concat", list(groups.values()), axis=1) if len(groups) > 1 else groups[0]
        width = sum({g: t.shape[1] for t, g in zip(op.tables, op.groups, strict=True)}.values())
        value = g.op("Unsqueeze", [g.op("Transpose", [rows], perm=[1, 0]), g.ints(0)])
        return Signal(value, np.ones(width, np.float32))

    def joined(self, name: str, x: Signal, start: int, keep: int, tail: int) -> str:
        """state.<name> (at first `start` zeros), x, and at the stream's end `tail` zeros; its last `keep` are kept."""
        state = self.state(name, [1, x.channels, start], 2)
        parts = [state, x.value]
        if tail:
            key = f"tail.{x.channels}x{tail}"
            if key not in self._tails:
                self._tails[key] = {"name": key, "channels": x.channels, "length": tail}
                self.graph.input(key, FLOAT, [1, x.channels, key.replace("tail", "zeros")])
            parts.append(key)
        joined = str(self.graph.op("Concat", parts, axis=2))
        self.keep(name, self.slice(joined, -keep, END, 2), [1, x.channels, f"keep.{name}"])
        return joined

    def _bound(self, name: str, push: str, then: int, otherwise: int) -> str:
        """Input `name`: `then` in the stream's "first" or "last" push, `otherwise` in all others."""
        if name not in self._bounds:
            self._bounds[name] = {"name": name, "push": push, "then": then, "otherwise": otherwise}
            self.graph.input(name, INT64, [1])
        return name

    def _conv(self, op: ops.Conv, x: Signal, gain: F32 | None) -> Signal:
        g, length = self.graph, op.weight.shape[2]
        out = np.ones(op.outputs, np.float32) if gain is None else gain
        bias = None if op.bias is None else op.bias / out
        value = self.joined(op.name, x, op.left, (length - 1) * op.dilation, op.right) if length > 1 else x.value
        biases = [] if bias is None else [self.const(f"{op.name}.bias", bias)]
        flat = self.fused and op.depthwise  # as 2D: ONNX Runtime's blocked kernels know no 1D
        weight = self._kernel(op, x.gain, out, flat)
        if flat:
            value = g.op("Unsqueeze", [value, g.ints(2)])
        dilations = [1, op.dilation] if flat else [op.dilation]
        y = g.op("Conv", [value, weight, *biases], group=op.groups, dilations=dilations)
        return Signal(str(g.op("Squeeze", [y, g.ints(2)]) if flat else y), out)

    def _kernel(self, op: ops.Conv, gain_in: F32, gain_out: F32, flat: bool) -> str:
        """A convolution's weight [out, in / groups, k] ([out, in / groups, 1, k] if `flat`) with both gains."""
        weight = op.weight[:, :, None] if flat else op.weight
        if op.groups == 1:
            per_output = np.ones(1, np.float32)
            weight = weight * gain_in.reshape(1, -1, 1) if not self.half else weight
            gains = None if not self.half else gain_in
        else:
            per_output, gains = gain_in.reshape(op.groups, -1).repeat(op.outputs // op.groups, 0)[:, 0], None
        name = self.weight(f"{op.name}.weight", weight, per_output / gain_out)
        if gains is None or np.all(gains == 1):
            return name
        return str(self.graph.op("Mul", [name, self.const(f"{op.name}.gain_in", gains.reshape(1, -1, 1))]))

    def _up(self, op: ops.Up, x: Signal, gain: F32 | None) -> Signal:
        g, m = self.graph, len(op.taps)
        out = np.ones(op.outputs, np.float32) if gain is None else gain
        z = self.joined(op.name, x, op.left, op.left, op.right) if op.left else x.value
        windows = [self.slice(z, j, j - m + 1 or END, 2) for j in range(m)] if m > 1 else [z]
        rows = self._depthwise_rows(op, windows, x.gain, out) if op.depthwise else self._rows(op, windows, x.gain, out)
        y = g.op("Reshape", [rows, g.ints(1, -1, op.outputs)])
        if op.drop or op.crop:
            start = self._bound(f"start.{op.name}", "first", op.drop, 0)
            stop = self._bound(f"stop.{op.name}", "last", -op.crop or END, END)
            y = g.op("Slice", [y, start, stop, g.ints(1)])
        return Signal(str(g.op("Transpose", [y], perm=[0, 2, 1])), out)

    def _rows(self, op: ops.Up, windows: Sequence[str], gain_in: F32, gain_out: F32) -> str:
        """[inputs, stride * outputs]: one matrix product over overlapping rows, where ConvTranspose would scatter."""
        g, m = self.graph, len(op.taps)
        stacked = g.op("Concat", windows, axis=1) if m > 1 else windows[0]
        folded = self.weight(f"{op.name}.weight", op.matrix, np.tile(gain_in, m), np.tile(gain_out, op.stride))
        inputs = [g.op("Squeeze", [stacked, g.ints(0)]), folded]
        if op.bias is not None:
            inputs.append(self.const(f"{op.name}.bias", np.tile(op.bias / gain_out, op.stride)))
        return str(g.op("Gemm", inputs, transA=1))

    def _depthwise_rows(self, op: ops.Up, windows: Sequence[str], gain_in: F32, gain_out: F32) -> str:
        """[1, inputs, stride, channels]"""
        g, y = self.graph, ""
        for j, window in enumerate(windows):
            rows = g.op("Unsqueeze", [g.op("Transpose", [window], perm=[0, 2, 1]), g.ints(2)])
            part = g.op("Mul", [rows, self.weight(f"{op.name}.weight{j}", op.taps[j], None, gain_out / gain_in)])
            y = g.op("Add", [y, part]) if y else part
        return g.op("Add", [y, self.const(f"{op.name}.bias", op.bias / gain_out)]) if op.bias is not None else y

    def _noise(self, op: ops.Noise, x: Signal, _: F32 | None) -> Signal:
        """Noise of no length leaves x whole: the first `len(noise)` samples get it, which is all or none of them."""
        g = self.graph
        noise = g.input(f"noise.{op.index}", FLOAT, [1, 1, f"noise{op.index}"])
        length, zero, axis = g.op("Shape", [noise], start=2), g.ints(0), g.ints(2)
        noisy = g.op("Slice", [x.value, zero, length, axis])
        plain = g.op("Slice", [x.value, length, g.ints(END), axis])
        weight = self.weight(f"{op.name}.weight", op.weight, 1 / x.gain, 1 / x.gain)
        added = g.op("Mul", [noise, g.op("MatMul", [weight, noisy])])
        return Signal(str(g.op("Concat", [g.op("Add", [noisy, added]), plain], axis=2)), x.gain)

    def _residual(self, op: ops.Residual, x: Signal, _: F32 | None) -> Signal:
        skip = x
        if op.delay:
            joined = self.joined(op.name, x, 0, op.delay, 0)
            stop = self._bound(f"skip.{op.delay}", "last", END, -op.delay)
            skip = Signal(self.graph.op("Slice", [joined, self.graph.ints(0), stop, self.graph.ints(2)]), x.gain)
        if op.shortcut is not None:
            skip = self._conv(op.shortcut, skip, skip.gain)
        y = self._run(op.body, x, skip.gain)
        return Signal(str(self.graph.op("Add", [y.value, skip.value])), skip.gain)

    def _pointwise(self, kind: str, x: Signal) -> Signal:
        return Signal(str(self.graph.op(kind, [self.natural(x)])), np.ones(x.channels, np.float32))
