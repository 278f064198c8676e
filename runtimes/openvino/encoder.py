"""Encoder on OpenVINO: log-mel in, LLM-width features out, one model with the adapter inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.encoder_window import wanted_features
from edgeomni.runtimes.openvino.models import ModelFactory
from edgeomni.spec import OmniSpec


class OvEncoder:
    """Fulfils components.Encoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, models: ModelFactory) -> None:
        self._spec = spec
        self._model = models.open(bundle_path / component.graphs["encoder"].path)
        # OpenVINO 2026.4's attention gives garbage for ever after where the first run that it sees has one position
        # (tests/test_openvino_runtime.py), so that the first one has two.
        self.encode(np.zeros((spec.front_end.n_mels, min(4, 2 * spec.encoder.context)), np.float32))

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> the first `wanted` features [wanted or t // 2, D].

        Setting `interrupt` from another thread ends the run after the layer that it is in, with Interrupted.
        Raises EngineError for another shape.
        """
        wanted = wanted_features(mel, wanted, self._spec)
        feed: dict[str, NDArray[Any]] = {"mel": np.ascontiguousarray(mel[None], np.float32)}
        feed["wanted"] = np.array([wanted], np.int64)
        features: F32 = self._model.run(feed, interrupt)["features"][0]
        return features

    def close(self) -> None:
        """Nothing is held beyond the model, which goes with this object."""
