"""What the graph of a codec's layers is built with: signals with gains, weights that take gains in, states, bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.exporters.onnx.graph import FLOAT, INT64
from edgeomni.exporters.onnx.operators import Operators

END = 2**31 - 1
"""As the end of a slice: to the end."""
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Signal:
    """A value [1, channels, samples] of the graph; what it stands for is gain [channels] times it."""

    value: str
    gain: F32

    @property
    def channels(self) -> int:
        return len(self.gain)


class CodecBuilder:
    """The parts that all layers share. `states`, `tails` and `bounds` collect what a runtime must feed to the graph.

    With `half`, weights are stored in half precision.
    """

    def __init__(self, operators: Operators, *, half: bool) -> None:
        self.operators, self.graph, self.half = operators, operators.graph, half
        self.states: list[dict[str, Any]] = []
        self.tails: dict[str, dict[str, Any]] = {}
        self.bounds: dict[str, dict[str, Any]] = {}

    def const(self, name: str, value: Any) -> str:
        """A float32 constant that is stored as it is."""
        return self.graph.floats(name, value)

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
            return self.const(name, math.prod(factors, start=value))
        y = self.stored(name, value)
        for i, factor in enumerate(factors):
            y = self.graph.op("Mul", [y, self.const(f"{name}.gain{i}", factor)])
        return y

    def stored(self, name: str, value: F32) -> str:
        """Constant `value` in float32, or stored in half and cast when the graph runs."""
        if not self.half:
            return self.const(name, value)
        return self.graph.op("Cast", [self.graph.const(np.ascontiguousarray(value, np.float16), name)], to=FLOAT)

    def natural(self, x: Signal) -> str:
        """The signal's value with its gain applied."""
        if np.all(x.gain == 1):
            return x.value
        gain = self.graph.const(x.gain[:, None].astype(np.float32))
        return self.graph.op("Mul", [x.value, gain])

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        g = self.graph
        return g.op("Slice", [x, g.ints(start), g.ints(stop), g.ints(axis)])

    def state(self, name: str, shape: Sequence[int], dynamic: int, dtype: int = FLOAT) -> str:
        """Input state.<name>, whose initial `shape` grows along axis `dynamic`."""
        kind = {FLOAT: "float32", INT64: "int64"}[dtype]
        self.states.append({"name": name, "shape": list(shape), "dtype": kind})
        dims: list[int | str] = list(shape)
        if dtype == FLOAT:
            dims[dynamic] = f"kept.{name}"
        return self.graph.input(f"state.{name}", dtype, dims)

    def keep(self, name: str, value: str, shape: Sequence[int | str], dtype: int = FLOAT) -> None:
        """Declares `value` as the next push's state.<name>."""
        self.graph.output(f"next.{name}", dtype, list(shape), value)

    def joined(self, name: str, x: Signal, start: int, keep: int, tail: int) -> str:
        """state.<name> (at first `start` zeros), x, and at the stream's end `tail` zeros; its last `keep` are kept."""
        parts = [self.state(name, [1, x.channels, start], 2), x.value]
        if tail:
            parts.append(self._tail(x.channels, tail))
        joined = self.graph.op("Concat", parts, axis=2)
        self.keep(name, self.slice(joined, -keep, END, 2), [1, x.channels, f"keep.{name}"])
        return joined

    def bound(self, name: str, push: str, then: int, otherwise: int) -> str:
        """Input `name`: `then` in the stream's "first" or "last" push, `otherwise` in all others."""
        if name not in self.bounds:
            self.bounds[name] = {"name": name, "push": push, "then": then, "otherwise": otherwise}
            self.graph.input(name, INT64, [1])
        return name

    def _tail(self, channels: int, length: int) -> str:
        name = f"tail.{channels}x{length}"
        if name not in self.tails:
            self.tails[name] = {"name": name, "channels": channels, "length": length}
            self.graph.input(name, FLOAT, [1, channels, name.replace("tail", "zeros")])
        return name
