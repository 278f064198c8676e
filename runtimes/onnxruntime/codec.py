"""Codec decoder on ONNX Runtime: the streaming graph of exporters/onnx/codec.py, its states handed on uncopied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgeomni.arrays import F32, I64
from edgeomni.bundle import Component
from edgeomni.hardware import cores
from edgeomni.runtimes.common.graph_codec import edge_values
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, translated
from edgeomni.spec import OmniSpec

Kept = dict[str, ort.OrtValue]


class OrtCodec(StreamingCodec[Kept]):
    """Fulfils components.CodecDecoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, sessions: SessionFactory) -> None:
        meta = component.meta
        super().__init__(spec.codec, Timing.of(meta))
        self._sessions, self._path = sessions, bundle_path / component.graphs["codec"].path
        self._session = self._all = sessions.open(self._path)
        self._with_fewer: dict[int, ort.InferenceSession] = {}
        self._device = getattr(sessions, "memory", "cpu")
        self._states = [state["name"] for state in meta["states"]]
        self._initial = self._values({s["name"]: np.zeros(s["shape"], s["dtype"]) for s in meta["states"]})
        self._edges = {
            (first, last): self._values(edge_values(meta, first, last)) for first in (0, 1) for last in (0, 1)
        }

    def set_threads(self, threads: int) -> None:
        """See components.SetsThreads. ONNX Runtime's threads belong to a session: fewer are a session of their own.

        It is opened by the first call that asks for so many, and kept.
        """
        if threads >= (self._sessions.threads or cores()) or self._device != "cpu":
            self._session = self._all
            return
        if threads not in self._with_fewer:
            self._with_fewer[threads] = self._sessions.with_threads(threads).open(self._path)
        self._session = self._with_fewer[threads]

    def _start(self) -> Kept:
        return self._initial

    def _push(self, codes: Sequence[I64], kept: Kept, last: bool, noise: Sequence[F32] | None) -> tuple[F32, Kept]:
        session = self._session
        binding = session.io_binding()
        for level, ids in enumerate(codes):
            binding.bind_ortvalue_input(f"codes.{level}", ort.OrtValue.ortvalue_from_numpy(ids))
        for i in range(len(self.timing.noise)):
            values = np.zeros(0, np.float32) if noise is None else noise[i]
            binding.bind_ortvalue_input(f"noise.{i}", ort.OrtValue.ortvalue_from_numpy(values[None, None]))
        for name, value in self._edges[kept is self._initial, last].items():
            binding.bind_ortvalue_input(name, value)
        for name, value in kept.items():
            binding.bind_ortvalue_input(f"state.{name}", value)
        binding.bind_output("wave", "cpu")
        for name in self._states:
            binding.bind_output(f"next.{name}", self._device)
        with translated("the codec failed", "verify the bundle with `edgeomni verify`"):
            session.run_with_iobinding(binding)
        wave, *states = binding.get_outputs()
        return wave.numpy()[0, 0], dict(zip(self._states, states, strict=True))

    def _values(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Kept:
        return {name: self._value(array) for name, array in arrays.items()}

    def _value(self, array: np.ndarray[Any, Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, "cpu" if array.dtype == np.int64 else self._device, 0)
