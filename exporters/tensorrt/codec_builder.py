"""What the static streaming graph of a codec is built with: states of full length, and masks of what is valid.

DESIGN.md's way for engines with fixed shapes: every layer's state has its full length from the start, zeros at first,
so that nothing has a length of its own. A layer then also gives outputs for positions before the answer's start and
behind its end, and those become zeros, which is what the layer behind would have had as its padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import FLOAT, INT64
from edgeomni.exporters.tensorrt.operators import TensorRtOperators
from edgeomni.model.codec_plan import Pace

END = 2**31 - 1
"""As the end of a slice: to the end."""


class StaticBuilder:
    """Graph, operators, inputs `pushed` and `total`, states and masks.

    `longest` is the most samples that a signal of one push has.
    """

    def __init__(self, operators: TensorRtOperators, longest: int) -> None:
        self.operators, self.graph = operators, operators.graph
        self.states: list[dict[str, Any]] = []
        g = self.graph
        self._pushed, self._total = (g.input(name, INT64, [1]) for name in ("pushed", "total"))
        self._steps = g.const(np.arange(longest, dtype=np.int64), "steps")
        self._masks: dict[Pace, str] = {}

    def const(self, name: str, value: Any) -> str:
        return self.graph.floats(name, value)

    def weight(self, name: str, value: F32) -> str:
        """A constant in the type that products compute in."""
        return self.operators.stored(value, name)

    def product(self, x: str, name: str, weight: F32, bias: F32 | None = None) -> str:
        """x [.., k] @ weight.T (+ bias), the weight [n, k]."""
        operators, g = self.operators, self.graph
        y = operators.to_float(g.op("MatMul", [operators.to_narrow(x), self.weight(f"{name}.weight", weight.T)]))
        return y if bias is None else g.op("Add", [y, self.const(f"{name}.bias", bias)])

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        g = self.graph
        return g.op("Slice", [x, g.ints(start), g.ints(stop), g.ints(axis)])

    def joined(self, name: str, x: str, channels: int, keep: int) -> str:
        """The last `keep` samples before this push, then x [1, channels, n]."""
        return self.kept_before(name, x, [1, channels, keep], 2)

    def kept_before(self, name: str, x: str, shape: list[int], axis: int) -> str:
        """state.<name> of `shape` and x along `axis`; the last of both together are kept."""
        if not shape[axis]:
            return x
        g = self.graph
        self.states.append({"name": name, "shape": shape, "dtype": "float32"})
        joined = g.op("Concat", [g.input(f"state.{name}", FLOAT, list(shape)), x], axis=axis)
        g.output(f"next.{name}", FLOAT, list(shape), self.slice(joined, -shape[axis], END, axis))
        return joined

    def steps(self, x: str, axis: int = 2) -> str:
        """0 .. n - 1, n the length of x along `axis`; int64."""
        g = self.graph
        length = g.op("Shape", [x], start=axis, end=axis + 1)
        return g.op("Slice", [self._steps, g.ints(0), length, g.ints(0)])

    def positions(self, x: str, pace: Pace, axis: int = 2) -> str:
        """Of each sample of x, counted from the answer's start; int64 [n], negative before it."""
        return self.graph.op(
            "Add",
            [self.steps(x, axis), self.graph.op("Sub", [self._scaled(self._pushed, pace), self._number(pace.lag)])],
        )

    def valid(self, x: str, pace: Pace) -> str:
        """x [1, channels, n] with zeros where a position lies before the answer's start or behind its end."""
        g = self.graph
        if pace not in self._masks:
            positions = self.positions(x, pace)
            begun = g.op("GreaterOrEqual", [positions, self._number(0)])
            ended = g.op("Less", [positions, self._scaled(self._total, pace)])
            self._masks[pace] = g.op("And", [begun, ended])
        return g.op("Where", [self._masks[pace], x, self.const("zero", 0.0)])

    def _scaled(self, latents: str, pace: Pace) -> str:
        return self.graph.op("Mul", [latents, self._number(pace.scale)])

    def _number(self, value: int) -> str:
        return self.graph.ints(value)
