"""Encoder on ONNX Runtime: log-mel in, LLM-width features out, one graph with the adapter inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.encoder_window import wanted_features
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, interruptible
from edgeomni.spec import OmniSpec


class OrtEncoder:
    """Fulfils components.Encoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, sessions: SessionFactory) -> None:
        self._spec = spec
        dynamic = component.meta.get("flavour") == "ort" and "int8_dynamic" in component.scheme.values()
        self._session = sessions.open(bundle_path / component.graphs["encoder"].path, dynamic=dynamic)
        self._cuts = "wanted" in {i.name for i in self._session.get_inputs()}

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> the first `wanted` features [wanted or t // 2, D].

        Setting `interrupt` from another thread ends the run after the operator that it is in, with Interrupted.
        Raises EngineError for another shape.
        """
        wanted = wanted_features(mel, wanted, self._spec)
        feed = {"mel": np.ascontiguousarray(mel[None], np.float32)}
        if self._cuts:
            feed["wanted"] = np.array([wanted])
        with interruptible(interrupt, "the encoder failed", "try a shorter window or fewer threads") as options:
            features: F32 = self._session.run(["features"], feed, options)[0][0]
        return features[:wanted]

    def close(self) -> None:
        """Nothing is held beyond the session, which goes with this object."""
