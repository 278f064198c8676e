"""One push through a codec's layers as a graph; edgeomni/model/codec_plan.py tells what the layers do.

Signals are [samples, channels]. A layer that looks at neighbours joins what it kept of the push before, its input, and
at the stream's end its padding; the last samples of that are what it keeps for the next push.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.codec_layers import CodecLayer
from edgeomni.runtimes.ggml import codec_attention, numpy_operations
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.files import Weights
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F16
from edgeomni.runtimes.ggml.library import F32 as FLOAT
from edgeomni.runtimes.ggml.pushes import Push, Signal, edges, nodes_for

Arrays = dict[str, NDArray[Any]]
_FEW_OUTPUTS = 8
"""Matrices with fewer rows read their overlapping inputs where they lie; for others a copy is faster."""


class Decoding:
    """The graph of one kind of push. `vectors` are the float vectors of the layers, for numpy's operations.

    `exact` keeps the activation's polynomial to float32's precision, as float32 weights are worth.
    """

    def __init__(
        self,
        layers: Sequence[CodecLayer],
        width: int,
        weights: Weights,
        vectors: Mapping[str, F32],
        backend: Backend,
        push: Push,
        *,
        exact: bool,
    ) -> None:
        self.layers, self.push, self.weights, self.vectors, self.exact = layers, push, weights, vectors, exact
        self.kept_shapes = dict(push.kept)
        self.graph = Graph(backend=backend, nodes=nodes_for(layers))
        self.states: dict[str, int] = {}
        self.next: dict[str, int] = {}
        self.noises: dict[int, int] = {}
        self.fixed: dict[int, NDArray[Any]] = {}
        """Inputs that are the same in every run: zeros."""
        self.given: dict[str, int] = {}
        """Inputs that codec_attention computes on this side for each run: positions and masks."""
        self.latents = self.graph.input(FLOAT, push.latents, width) if push.latents else None
        wave = self.natural(self.run(layers, Signal(self.latents, width)))
        self.wave = wave.value
        if self.wave is not None:
            self.graph.output(self.wave)
        self.graph.ready()

    def __call__(
        self, latents: F32, kept: Arrays, noise: Sequence[F32] | None, extra: Mapping[str, NDArray[Any]]
    ) -> tuple[F32, Arrays]:
        """latents [n, width], what was kept, noise per block -> samples [s], what is kept now."""
        given = dict(self.fixed)
        if self.latents is not None:
            given[self.latents] = latents
        given |= {tensor: kept[name] for name, tensor in self.states.items()}
        given |= {tensor: noise[index] for index, tensor in self.noises.items()} if noise is not None else {}
        given |= {tensor: extra[name] for name, tensor in self.given.items()}
        outputs = [*([] if self.wave is None else [self.wave]), *self.next.values()]
        found = self.graph.compute(given, outputs)
        wave = np.zeros(0, np.float32) if self.wave is None else found.pop(0).reshape(-1)
        return wave, dict(zip(self.next, found, strict=True))

    # --- layers

    def run(self, layers: Sequence[CodecLayer], x: Signal) -> Signal:
        for i, layer in enumerate(layers):
            following = layers[i + 1] if i + 1 < len(layers) else None
            if layer.op == "snake" and following is not None and following.op in ("conv", "up"):
                x = self.snake(layer, x, following)
            elif i and layers[i - 1].op == "snake" and layer.op in ("conv", "up"):
                x = self._applied(layer, x)  # the snake has joined its input already
            else:
                x = self.apply(layer, x)
        return x

    def apply(self, layer: CodecLayer, x: Signal) -> Signal:
        """A layer's output for its input x."""
        if layer.op == "residual":
            return self.residual(layer, x)
        if layer.op == "snake":
            return self.snake(layer, x, None)
        x = self.natural(x)
        if layer.op in ("conv", "up"):
            joined = self.joined(layer.name, x, *edges(layer))
            return self._applied(layer, joined)
        if layer.op == "local_attention":
            return codec_attention.local(self, layer, x)
        if x.value is None:
            return x
        if layer.op == "transformer":
            return codec_attention.transformer(self, layer, x)
        if layer.op == "noise":
            return self.noise(layer, x)
        return Signal(self.graph.unary(layer.op, x.value), x.channels)

    def _applied(self, layer: CodecLayer, x: Signal) -> Signal:
        """A convolution of what has been joined."""
        if x.value is None:
            return Signal(None, layer.outputs)
        value = self.convolution(layer, x.value) if layer.op == "conv" else self.upsampling(layer, x.value)
        return Signal(value, layer.outputs, self.vectors.get(f"{layer.name}.bias"))

    def convolution(self, layer: CodecLayer, x: int) -> int:
        g, weight = self.graph, self.weights[f"{layer.name}.weight"]
        if layer.depthwise:
            return self.depthwise(layer, weight, x)
        if layer.taps > 1 and layer.dilation == 1:
            x = self._overlapping(x, layer.taps, layer.outputs, weight)
        elif layer.taps > 1:
            n = g.shape(x)[0] - (layer.taps - 1) * layer.dilation
            shifted = [g.cut(x, i * layer.dilation, i * layer.dilation + n) for i in range(layer.taps)]
            x = shifted[0]
            for part in shifted[1:]:
                x = g.joined(x, part, axis=1)
        return g.linear(weight, x)

    def depthwise(self, layer: CodecLayer, weight: int, x: int) -> int:
        g = self.graph
        if layer.taps > 1 and layer.outputs > 2:
            return g.depthwise(weight, x, layer.dilation)
        n = g.shape(x)[0] - (layer.taps - 1) * layer.dilation
        y = g.mul(g.cut(x, 0, n), g.cut(weight, 0, 1))
        for i in range(1, layer.taps):
            y = g.add(y, g.mul(g.cut(x, i * layer.dilation, i * layer.dilation + n), g.cut(weight, i, i + 1)))
        return y

    def upsampling(self, layer: CodecLayer, x: int) -> int:
        """[n, inputs] -> [(n - taps + 1) * stride - what does not belong to the stream, outputs]: one matrix product
        over overlapping inputs, where a transposed convolution would scatter; `stride` samples lie in each row of it.
        """
        g, weight = self.graph, self.weights[f"{layer.name}.weight"]
        n = g.shape(x)[0] - layer.left
        if layer.depthwise:
            rows = self._depthwise_rows(layer, weight, x, n)
        else:
            rows = g.linear(weight, self._overlapping(x, layer.taps, layer.outputs, weight))
        y = g.reshaped(rows, n * layer.stride, layer.outputs)
        return g.cut(y, layer.drop * self.push.first, n * layer.stride - layer.crop * self.push.last)

    def snake(self, layer: CodecLayer, x: Signal, following: CodecLayer | None) -> Signal:
        """The activation, joined with what the convolution after it keeps, which saves a copy on the CPU."""
        name, span = ("", (0, 0, 0)) if following is None else (following.name, edges(following))
        alpha = self.vectors[f"{layer.name}.alpha"]
        if not self.graph.backend.numpy_operations or x.value is None:
            return self.joined(name, self._plain_snake(layer, self.natural(x), alpha), *span)
        before, after = self._before(name, x.channels, span[0]), span[2] * self.push.last
        value = numpy_operations.snake(self.graph, x.value, alpha, x.bias, before, after, exact=self.exact)
        self._keep(name, value, span[1])
        return Signal(value, x.channels)

    def residual(self, layer: CodecLayer, x: Signal) -> Signal:
        """The body's output and x, which is delayed as much as the body lags; at the stream's end it catches up."""
        if layer.shortcut is not None or not self.graph.backend.numpy_operations:
            x = self.natural(x)
        y = self.run(layer.body, x)
        fused = layer.shortcut is None and self.graph.backend.numpy_operations and None not in (x.value, y.value)
        if not fused:
            return self._plain_residual(layer, self.natural(x), self.natural(y))
        before = self._before(layer.name, x.channels, 0, joined=False)
        assert x.value is not None and y.value is not None
        self._keep_delayed(layer, x.value, before)
        biases = [bias for bias in (x.bias, y.bias) if bias is not None]
        bias = np.asarray(np.sum(biases, axis=0), np.float32) if biases else None
        return Signal(numpy_operations.residual(self.graph, y.value, x.value, before, bias), layer.outputs)

    def noise(self, layer: CodecLayer, x: Signal) -> Signal:
        if not self.push.noisy or x.value is None:
            return x
        g = self.graph
        values = self.noises[layer.index] = g.input(FLOAT, g.shape(x.value)[0], 1)
        weighted = g.mul(g.linear(self.weights[f"{layer.name}.weight"], x.value), values)
        return Signal(g.add(x.value, weighted), x.channels)

    # --- between layers

    def natural(self, x: Signal) -> Signal:
        """x with its bias added."""
        if x.bias is None or x.value is None:
            return Signal(x.value, x.channels)
        bias = self.graph.input(FLOAT, 1, x.channels)
        self.fixed[bias] = x.bias[None]
        return Signal(self.graph.add(x.value, bias), x.channels)

    def joined(self, name: str, x: Signal, start: int, keep: int, tail: int) -> Signal:
        """What was kept (at the stream's start `start` zeros), x, at its end `tail` zeros; keeps the last `keep`."""
        if not (start or keep or tail):
            return x
        parts = [self._before(name, x.channels, start), x.value]
        if tail and self.push.last:
            parts.append(self.zeros(tail, x.channels))
        value: int | None = None
        for part in parts:
            if part is not None:
                value = part if value is None else self.graph.joined(value, part)
        if value is not None:
            self._keep(name, value, keep)
        return Signal(value, x.channels)

    def zeros(self, rows: int, channels: int) -> int:
        tensor = self.graph.input(FLOAT, rows, channels)
        self.fixed[tensor] = np.zeros((rows, channels), np.float32)
        return tensor

    def state(self, name: str) -> int | None:
        """The rows that were kept under this name; None for none."""
        shape = self.kept_shapes.get(name)
        if shape is None or 0 in shape:
            return None
        self.states[name] = self.graph.input(FLOAT, *shape)
        return self.states[name]

    def keep(self, name: str, rows: int) -> None:
        """Keeps a copy of these rows for the next push, made now, so that the signal's own memory is soon free."""
        self.next[name] = self.graph.copied(rows)
        self.graph.output(self.next[name])

    def _before(self, name: str, channels: int, start: int, *, joined: bool = True) -> int | None:
        if not name:
            return None
        if self.push.first:
            return self.zeros(start, channels) if start and joined else None
        return self.state(name)

    def _keep(self, name: str, value: int, count: int) -> None:
        if count and not self.push.last:
            rows = self.graph.shape(value)[0]
            self.keep(name, self.graph.cut(value, max(0, rows - count), rows))

    def _keep_delayed(self, layer: CodecLayer, x: int, before: int | None) -> None:
        """Keeps the last `delay` rows of what was kept and x, which x alone has unless it is short."""
        if not layer.delay or self.push.last:
            return
        if before is not None and self.graph.shape(x)[0] < layer.delay:
            x = self.graph.joined(before, x)
        self._keep(layer.name, x, layer.delay)

    def _plain_residual(self, layer: CodecLayer, x: Signal, y: Signal) -> Signal:
        g = self.graph
        if layer.delay:
            x = self.joined(layer.name, x, 0, layer.delay, 0)
        if y.value is None or x.value is None:
            return Signal(None, layer.outputs)
        skip = Signal(g.cut(x.value, 0, g.shape(y.value)[0]), x.channels)
        if layer.shortcut is not None:
            skip = self.natural(self.apply(layer.shortcut, skip))
        assert skip.value is not None
        return Signal(g.add(y.value, skip.value), layer.outputs)

    def _plain_snake(self, layer: CodecLayer, x: Signal, alpha: F32) -> Signal:
        """The activation of ggml's own operations, which are the fast ones on a GPU."""
        if x.value is None:
            return x
        g, safe = self.graph, np.where(np.abs(alpha) < 1e-9, np.float32(1e-9), alpha)
        inverse = g.input(FLOAT, 1, x.channels)
        self.fixed[inverse] = (1 / safe)[None].astype(np.float32)
        turned = g.unary("sin", g.mul(x.value, self.weights[f"{layer.name}.alpha"]))
        return Signal(g.add(x.value, g.mul(g.mul(turned, turned), inverse)), x.channels)

    def _overlapping(self, x: int, count: int, outputs: int, weight: int) -> int:
        """Rows of `count` neighbours each. float16 products copy their inputs anyway, and few rows need no copy."""
        if count == 1:
            return x
        windows = self.graph.windows(x, count)
        as_it_lies = self.graph.backend.on_cpu and (outputs < _FEW_OUTPUTS or self.graph.type_of(weight) == F16)
        return windows if as_it_lies else self.graph.contiguous(windows)

    def _depthwise_rows(self, layer: CodecLayer, weight: int, x: int, n: int) -> int:
        """[n, stride, channels]: each tap's rows times as many inputs."""
        g, c = self.graph, layer.outputs
        y: int | None = None
        for i in range(layer.taps):
            held = g.repeated(g.reshaped(g.cut(x, i, i + n), n, 1, c), n, layer.stride, c)
            part = g.mul(held, g.cut(weight, i * layer.stride, (i + 1) * layer.stride))
            y = part if y is None else g.add(y, part)
        assert y is not None
        return y
