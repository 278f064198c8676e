"""Codec decoder on OpenVINO: the streaming graph of exporters/onnx/codec.py, its states handed on from push to push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I64
from edgeomni.bundle import Component
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing
from edgeomni.runtimes.openvino.models import ModelFactory, output, run
from edgeomni.spec import OmniSpec

Kept = dict[str, NDArray[Any]]


class OvCodec(StreamingCodec[Kept]):
    """Fulfils components.CodecDecoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, models: ModelFactory) -> None:
        meta = component.meta
        noise = tuple((pace["scale"], pace["lag"]) for pace in meta["noise"])
        super().__init__(spec.codec, Timing(meta["first_push"], meta["push_multiple"], meta["lag_samples"], noise))
        self._model = models.open(bundle_path / component.graphs["codec"].path)
        self._request = self._model.create_infer_request()
        self._initial = {s["name"]: np.zeros(s["shape"], s["dtype"]) for s in meta["states"]}
        self._edges = {(first, last): _edge_values(meta, first, last) for first in (0, 1) for last in (0, 1)}

    def _start(self) -> Kept:
        return self._initial

    def _push(self, codes: Sequence[I64], kept: Kept, last: bool, noise: Sequence[F32] | None) -> tuple[F32, Kept]:
        inputs: dict[str, NDArray[Any]] = {f"codes.{level}": ids for level, ids in enumerate(codes)}
        for i in range(len(self.timing.noise)):
            values = np.zeros(0, np.float32) if noise is None else noise[i]
            inputs[f"noise.{i}"] = values[None, None]
        inputs |= self._edges[kept is self._initial, last]
        inputs |= {f"state.{name}": value for name, value in kept.items()}
        run(self._request, inputs, "the codec")
        states = {name: np.array(self._request.get_tensor(f"next.{name}").data) for name in kept}
        return output(self._request, "wave")[0, 0], states


def _edge_values(meta: Mapping[str, Any], first: int, last: int) -> Kept:
    """The inputs that depend only on whether a push is the first and whether it is the last."""
    values: Kept = {
        tail["name"]: np.zeros((1, tail["channels"], tail["length"] * last), np.float32) for tail in meta["tails"]
    }
    for bound in meta["bounds"]:
        here = {"first": first, "last": last}[bound["push"]]
        values[bound["name"]] = np.array([bound["then" if here else "otherwise"]], np.int64)
    return values
