"""The codec decoder of a TensorRT bundle on ONNX Runtime: the graph with states of fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.runtimes.common.static_codec import StaticCodec
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, translated
from edgeomni.spec import OmniSpec

States = dict[str, ort.OrtValue]


class OrtStaticCodec(StaticCodec[States]):
    """Fulfils components.CodecDecoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, sessions: SessionFactory) -> None:
        super().__init__(spec.codec, component.meta)
        self._session, self._device = sessions.open(bundle_path / component.graphs["codec"].path), sessions.device
        shapes = {state["name"]: np.zeros(state["shape"], state["dtype"]) for state in component.meta["states"]}
        self._zeros = {name: ort.OrtValue.ortvalue_from_numpy(v, self._device, 0) for name, v in shapes.items()}

    def _compute(self, inputs: Mapping[str, NDArray[Any]], states: States | None) -> tuple[F32, States]:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        for name, state in (states or self._zeros).items():
            binding.bind_ortvalue_input(f"state.{name}", state)
        binding.bind_output("wave", "cpu")
        for name in self._zeros:
            binding.bind_output(f"next.{name}", self._device)
        with translated("the codec failed", "verify the bundle with `edgeomni verify`"):
            self._session.run_with_iobinding(binding)
        wave, *kept = binding.get_outputs()
        return wave.numpy()[0, 0], dict(zip(self._zeros, kept, strict=True))
