"""Codec decoder on OpenVINO: the streaming graph of exporters/onnx/codec.py, its states handed on from push to push."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I64
from edgeomni.bundle import Component
from edgeomni.hardware import cores
from edgeomni.runtimes.common.graph_codec import edge_values
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing
from edgeomni.runtimes.openvino.models import Model, ModelFactory
from edgeomni.spec import OmniSpec
from edgeomni.streaming import GROWTH

Kept = dict[str, NDArray[Any]]
Push = tuple[bool, bool, int]
"""Whether a push is the stream's first, whether it is its last, and how many ids of level 0 it holds."""
Shapes = dict[str, tuple[int, ...]]
"""Of the states, by name."""


class Compiled(NamedTuple):
    """The codec for one number of threads: for pushes of any size, and for those of known length, with their states."""

    any_push: Model
    fixed: dict[Push, tuple[Model, Shapes]]


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
        self._factory, self._source = models, models.read(bundle_path / component.graphs["codec"].path)
        self._all = self._now = Compiled(models.compiled(self._source), self._known_lengths())
        self._with_fewer: dict[int, Compiled] = {}

    def set_threads(self, threads: int) -> None:
        """See components.SetsThreads. OpenVINO's threads belong to a compiled model: fewer are models of their own.

        Only the push that repeats gets one, compiled by the first call that asks for so many, and kept. The few others
        of an answer keep their models and all threads: a second model of any length would take 150 MB at SNAC's size.
        """
        if threads >= (self._factory.threads or cores()) or self._factory.device != "CPU":
            self._now = self._all
            return
        if threads not in self._with_fewer:
            self._with_fewer[threads] = self._compiled_for(self._factory.with_threads(threads))
        self._now = self._with_fewer[threads]

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
        now = self._now
        model, shapes = now.fixed.get(push, (now.any_push, {}))
        fits = noise is None and all(kept[name].shape == shape for name, shape in shapes.items())
        return model if fits else now.any_push

    def _compiled_for(self, factory: ModelFactory) -> Compiled:
        """The push that repeats, compiled by `factory`: of known length, or where there is none of that, of any."""
        repeated = {push: shapes for push, (_, shapes) in self._all.fixed.items() if not push[0]}
        if not repeated:
            return Compiled(factory.compiled(self._source), self._all.fixed)
        own = {push: (self._fixed(factory, push, shapes), shapes) for push, shapes in repeated.items()}
        return Compiled(self._all.any_push, self._all.fixed | own)

    def _known_lengths(self) -> dict[Push, tuple[Model, Shapes]]:
        """The models of the first push, and of the one that repeats if the states then keep their lengths."""
        per_frame = self.spec.ids_per_level[0]
        first, initial = (True, False, self.first_push * per_frame), _shapes(self._initial)
        fixed = {first: (self._fixed(self._factory, first, initial), initial)}
        kept = _states_after(fixed[first][0])
        if kept is not None:
            steady = False, False, GROWTH[-1] * self.push_multiple * per_frame
            model = self._fixed(self._factory, steady, kept)
            if _states_after(model) == kept:
                fixed[steady] = model, kept
        return fixed

    def _fixed(self, factory: ModelFactory, push: Push, states: Shapes) -> Model:
        """The model of pushes of that length, not at the stream's end, noise off."""
        edges, frames = self._edges[push[0], False], push[2] // self.spec.ids_per_level[0]
        shapes: dict[str, Sequence[int]] = {f"codes.{i}": [frames * n] for i, n in enumerate(self.spec.ids_per_level)}
        shapes |= {f"state.{name}": shape for name, shape in states.items()}
        shapes |= {f"noise.{i}": [1, 1, 0] for i in range(len(self.timing.noise))}
        shapes |= {name: value.shape for name, value in edges.items() if value.dtype == np.float32}
        bounds = {name: value for name, value in edges.items() if value.dtype == np.int64}
        return factory.compiled(self._source, shapes, bounds)


def _shapes(states: Kept) -> Shapes:
    return {name: value.shape for name, value in states.items()}


def _states_after(model: Model) -> Shapes | None:
    """The shapes of the states that a model of fixed lengths puts out; None where they depend on values."""
    shapes = [value.get_partial_shape() for value in model.compiled.outputs]
    if any(shape.is_dynamic for shape in shapes):
        return None
    known = zip(model.outputs, (tuple(shape.to_shape()) for shape in shapes), strict=True)
    return {name.removeprefix("next."): shape for name, shape in known if name != "wave"}
