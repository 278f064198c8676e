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

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx import codec_attention, snake
from edgeomni.exporters.onnx.codec_builder import END, CodecBuilder, Signal
from edgeomni.exporters.onnx.graph import FLOAT, INT64, Graph, signature
from edgeomni.exporters.onnx.operators import Operators, operators_for
from edgeomni.exporters.onnx.options import Flavour, OnnxOptions
from edgeomni.exporters.onnx.precisions import schemes_for
from edgeomni.model import codec_plan as ops
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import read_plan

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

OPSET = 21
"""The codec's standard operators need no newer one, so that more engines take the portable graph."""


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OnnxOptions) -> Component:
    """Writes out_dir/codec.onnx and its data; what a runtime needs to know of it goes into the component's meta."""
    schemes = schemes_for("codec", precision, options)
    plan = read_plan(model.codec, model.spec.codec)
    graph, meta = build(plan, options.flavour, half=schemes["codec"].kind == "fp16")
    files = graph.save(out_dir / "codec.onnx")
    path = files[0].relative_to(root).as_posix()
    return Component(
        name="codec",
        engine="onnxruntime",
        format="onnx",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"codec": GraphEntry(path, *signature(files[0]))},
        meta={"flavour": options.flavour, **meta},
        files=describe_files(root, files),
    )


def build(
    plan: CodecPlan, flavour: Flavour, *, half: bool, operators: Operators | None = None
) -> tuple[Graph, dict[str, Any]]:
    """The graph of a codec's layers, and what a runtime must feed to it; `half` stores weights in half precision.

    `operators` replaces the flavour's, for a format that has its own (exporters/openvino). Gains between layers
    (1 / alpha of the snakes) are folded into the neighbouring weights.
    """
    builder = CodecBuilder(operators or operators_for(flavour, "codec", OPSET), half=half)
    layers = _Layers(builder)
    wave = layers.run(plan.ops[1:], layers.lookup(plan.ops[0]), None)  # type: ignore[arg-type]
    builder.graph.output("wave", FLOAT, [1, 1, "samples"], builder.natural(wave))
    return builder.graph, {
        "first_push": plan.first_push,
        "push_multiple": plan.push_multiple,
        "lag_samples": plan.lag_samples,
        "states": builder.states,
        "tails": list(builder.tails.values()),
        "bounds": list(builder.bounds.values()),
        "noise": [asdict(pace) for pace in plan.noise_paces],
    }


class _Layers:
    """Adds layers to the builder's graph, each by the function of its kind."""

    def __init__(self, builder: CodecBuilder) -> None:
        self.builder, self.graph, self.operators = builder, builder.graph, builder.operators
        self._emit = {
            ops.Conv: self._conv,
            ops.Up: self._up,
            ops.Residual: self._residual,
            ops.Noise: self._noise,
            ops.Snake: lambda op, x, _: snake.emit(builder, op, x),
            ops.Elu: lambda _, x, __: self._pointwise("Elu", x),
            ops.Tanh: lambda _, x, __: self._pointwise("Tanh", x),
            ops.LocalAttention: lambda op, x, _: codec_attention.local(builder, op, x),
            ops.Transformer: lambda op, x, _: codec_attention.transformer(builder, op, x),
        }

    def run(self, layers: Sequence[ops.Op], x: Signal, gain: F32 | None) -> Signal:
        """The layers one after another; `gain` is what the last one should put out with, if it can choose."""
        for i, op in enumerate(layers):
            rest = layers[i + 1 :]
            wanted = snake.wanted_gain(self.builder, rest) if rest else gain
            x = self._emit[type(op)](op, x, wanted)  # type: ignore[operator]
        return x

    def lookup(self, op: ops.Lookup) -> Signal:
        g, groups = self.graph, dict[int, str]()
        for level, (table, stride, group) in enumerate(zip(op.tables, op.strides, op.groups, strict=True)):
            ids = g.input(f"codes.{level}", INT64, [f"ids{level}"])
            if stride > 1:
                held = g.op("Expand", [g.op("Unsqueeze", [ids, g.ints(1)]), g.ints(1, stride)])
                ids = g.op("Reshape", [held, g.ints(-1)])
            stored = g.const(table.astype(np.float16 if self.builder.half else np.float32), f"{op.name}.{level}")
            rows = g.op("Gather", [stored, ids])
            if self.builder.half:
                rows = g.op("Cast", [rows], to=FLOAT)
            groups[group] = g.op("Add", [groups[group], rows]) if group in groups else rows
        rows = g.op("Concat", list(groups.values()), axis=1) if len(groups) > 1 else groups[0]
        width = sum({g: t.shape[1] for t, g in zip(op.tables, op.groups, strict=True)}.values())
        value = g.op("Unsqueeze", [g.op("Transpose", [rows], perm=[1, 0]), g.ints(0)])
        return Signal(value, np.ones(width, np.float32))

    def _conv(self, op: ops.Conv, x: Signal, gain: F32 | None) -> Signal:
        length = op.weight.shape[2]
        out = np.ones(op.outputs, np.float32) if gain is None else gain
        bias = None if op.bias is None else op.bias / out
        value = (
            self.builder.joined(op.name, x, op.left, (length - 1) * op.dilation, op.right) if length > 1 else x.value
        )
        biases = [] if bias is None else [self.builder.const(f"{op.name}.bias", bias)]
        conv = self.operators.depthwise_conv if op.depthwise else self.operators.conv
        return Signal(conv(value, [self._kernel(op, x.gain, out), *biases], op.groups, op.dilation), out)

    def _kernel(self, op: ops.Conv, gain_in: F32, gain_out: F32) -> str:
        """A convolution's weight [out, in / groups, k] with both gains, in the shape that its operator takes."""
        weight = self.operators.depthwise_kernel(op.weight) if op.depthwise else op.weight
        if op.groups == 1:
            per_output = np.ones(1, np.float32)
            weight = weight * gain_in.reshape(1, -1, 1) if not self.builder.half else weight
            gains = None if not self.builder.half else gain_in
        else:
            per_output, gains = gain_in.reshape(op.groups, -1).repeat(op.outputs // op.groups, 0)[:, 0], None
        name = self.builder.weight(f"{op.name}.weight", weight, per_output / gain_out)
        if gains is None or np.all(gains == 1):
            return name
        return self.graph.op("Mul", [name, self.builder.const(f"{op.name}.gain_in", gains.reshape(1, -1, 1))])

    def _up(self, op: ops.Up, x: Signal, gain: F32 | None) -> Signal:
        g, m = self.graph, len(op.taps)
        out = np.ones(op.outputs, np.float32) if gain is None else gain
        z = self.builder.joined(op.name, x, op.left, op.left, op.right) if op.left else x.value
        windows = [self.builder.slice(z, j, j - m + 1 or END, 2) for j in range(m)] if m > 1 else [z]
        rows = self._depthwise_rows(op, windows, x.gain, out) if op.depthwise else self._rows(op, windows, x.gain, out)
        y = g.op("Reshape", [rows, g.ints(1, -1, op.outputs)])
        if op.drop or op.crop:
            start = self.builder.bound(f"start.{op.name}", "first", op.drop, 0)
            stop = self.builder.bound(f"stop.{op.name}", "last", -op.crop or END, END)
            y = g.op("Slice", [y, start, stop, g.ints(1)])
        return Signal(g.op("Transpose", [y], perm=[0, 2, 1]), out)

    def _rows(self, op: ops.Up, windows: Sequence[str], gain_in: F32, gain_out: F32) -> str:
        """[inputs, stride * outputs]: one matrix product over overlapping rows, where ConvTranspose would scatter."""
        g, m = self.graph, len(op.taps)
        stacked = g.op("Concat", windows, axis=1) if m > 1 else windows[0]
        folded = self.builder.weight(f"{op.name}.weight", op.matrix, np.tile(gain_in, m), np.tile(gain_out, op.stride))
        inputs = [g.op("Squeeze", [stacked, g.ints(0)]), folded]
        if op.bias is not None:
            inputs.append(self.builder.const(f"{op.name}.bias", np.tile(op.bias / gain_out, op.stride)))
        return g.op("Gemm", inputs, transA=1)

    def _depthwise_rows(self, op: ops.Up, windows: Sequence[str], gain_in: F32, gain_out: F32) -> str:
        """[1, inputs, stride, channels]"""
        g, y = self.graph, ""
        for j, window in enumerate(windows):
            rows = g.op("Unsqueeze", [g.op("Transpose", [window], perm=[0, 2, 1]), g.ints(2)])
            part = g.op(
                "Mul", [rows, self.builder.weight(f"{op.name}.weight{j}", op.taps[j], None, gain_out / gain_in)]
            )
            y = g.op("Add", [y, part]) if y else part
        return g.op("Add", [y, self.builder.const(f"{op.name}.bias", op.bias / gain_out)]) if op.bias is not None else y

    def _noise(self, op: ops.Noise, x: Signal, _: F32 | None) -> Signal:
        """Noise of no length leaves x whole: the first `len(noise)` samples get it, which is all or none of them."""
        g = self.graph
        noise = g.input(f"noise.{op.index}", FLOAT, [1, 1, f"noise{op.index}"])
        length, zero, axis = g.op("Shape", [noise], start=2), g.ints(0), g.ints(2)
        noisy = g.op("Slice", [x.value, zero, length, axis])
        plain = g.op("Slice", [x.value, length, g.ints(END), axis])
        weight = self.builder.weight(f"{op.name}.weight", op.weight, 1 / x.gain, 1 / x.gain)
        added = g.op("Mul", [noise, g.op("MatMul", [weight, noisy])])
        return Signal(g.op("Concat", [g.op("Add", [noisy, added]), plain], axis=2), x.gain)

    def _residual(self, op: ops.Residual, x: Signal, _: F32 | None) -> Signal:
        skip = x
        if op.delay:
            joined = self.builder.joined(op.name, x, 0, op.delay, 0)
            stop = self.builder.bound(f"skip.{op.delay}", "last", END, -op.delay)
            skip = Signal(self.graph.op("Slice", [joined, self.graph.ints(0), stop, self.graph.ints(2)]), x.gain)
        if op.shortcut is not None:
            skip = self._conv(op.shortcut, skip, skip.gain)
        y = self.run(op.body, x, skip.gain)
        return Signal(self.graph.op("Add", [y.value, skip.value]), skip.gain)

    def _pointwise(self, kind: str, x: Signal) -> Signal:
        return Signal(self.graph.op(kind, [self.builder.natural(x)]), np.ones(x.channels, np.float32))
