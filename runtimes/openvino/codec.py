"""Codec decoder on OpenVINO: the streaming graph of exporters/onnx/codec.py, its states handed on from push to push."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I64
from edgeomni.bundle import Component
from edgeomni.runtimes.common.graph_codec import edge_values
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing
from edgeomni.runtimes.openvino.models import Model, ModelFactory
from edgeomni.spec import OmniSpec
from edgeomni.streaming import GROWTH

Kept = dict[str, NDArray[Any]]
Push = tuple[bool, bool, int]
"""Whether a push is the stream's first, whether it is its last, and how many ids of level 0 it holds."""
Compile = Callable[[Mapping[str, Sequence[int]], Mapping[str, NDArray[Any]]], Model]


class OvCodec(StreamingCodec[Kept]):
    """Fulfils components.CodecDecoder.

    One model takes pushes of any size. OpenVINO computes lengths that it knows beforehand several times as fast (it
    joins elementwise layers only then), so the two pushes that an answer's sound waits for have models of their own:
    the first one, and the one of the size that a long answer repeats.
    """

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, models: ModelFactory) -> None:
        meta = component.meta
        super().__init__(spec.codec, Timing.of(meta))
        self._initial = {s["name"]: np.zeros(s["shape"], s["dtype"]) for s in meta["states"]}
        self._edges = {(first, last): edge_values(meta, first, last) for first in (0, 1) for last in (0, 1)}
        source = models.read(bundle_path / component.graphs["codec"].path)
        self._model = models.compiled(source)
        self._fixed: dict[Push, tuple[Model, dict[str, tuple[int, ...]]]] = {}
        self._fix_lengths(partial(models.compiled, source))

    def _start(self) -> Kept:
        return self._initial

    def _push(self, codes: Sequence[I64], kept: Kept, last: bool, noise: Sequence[F32] | None) -> tuple[F32, Kept]:
        push = kept is self._initial, last, len(codes[0])
        silent = [np.zeros(0, np.float32) for _ in self.timing.noise]
        inputs: dict[str, NDArray[Any]] = {f"codes.{level}": ids for level, ids in enumerate(codes)}
        inputs |= {f"noise.{i}": values[None, None] for i, values in enumerate(noise or silent)}
        inputs |= {f"state.{name}": value for name, value in kept.items()} | self._edges[push[0], last]
        outputs = self._model_for(push, kept, noise).run(inputs)
        return outputs.pop("wave")[0, 0], {name: outputs[f"next.{name}"] for name in kept}

    def _model_for(self, push: Push, kept: Kept, noise: Sequence[F32] | None) -> Model:
        model, shapes = self._fixed.get(push, (self._model, {}))
        fits = noise is None and all(kept[name].shape == shape for name, shape in shapes.items())
        return model if fits else self._model

    def _fix_lengths(self, compiled: Compile) -> None:
        """Opens the models of the first push, and of the one that repeats if the states then keep their lengths."""
        initial = {name: value.shape for name, value in self._initial.items()}
        first = self._compiled_for(compiled, True, self.first_push, initial)
        kept = _states_after(first)
        if kept is None:
            return
        steady = self._compiled_for(compiled, False, GROWTH[-1] * self.push_multiple, kept)
        if _states_after(steady) != kept:
            del self._fixed[False, False, GROWTH[-1] * self.push_multiple * self.spec.ids_per_level[0]]

    def _compiled_for(self, compiled: Compile, first: bool, frames: int, states: dict[str, tuple[int, ...]]) -> Model:
        """The model of pushes of so many codec frames, not at the stream's end, noise off."""
        edges = self._edges[first, False]
        shapes: dict[str, Sequence[int]] = {f"codes.{i}": [frames * n] for i, n in enumerate(self.spec.ids_per_level)}
        shapes |= {f"state.{name}": shape for name, shape in states.items()}
        shapes |= {f"noise.{i}": [1, 1, 0] for i in range(len(self.timing.noise))}
        shapes |= {name: value.shape for name, value in edges.items() if value.dtype == np.float32}
        bounds = {name: value for name, value in edges.items() if value.dtype == np.int64}
        model = compiled(shapes, bounds)
        self._fixed[first, False, frames * self.spec.ids_per_level[0]] = model, states
        return model


def _states_after(model: Model) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the states that a model of fixed lengths puts out; None where they depend on values."""
    shapes = [value.get_partial_shape() for value in model.compiled.outputs]
    if any(shape.is_dynamic for shape in shapes):
        return None
    known = zip(model.outputs, (tuple(shape.to_shape()) for shape in shapes), strict=True)
    return {name.removeprefix("next."): shape for name, shape in known if name != "wave"}
