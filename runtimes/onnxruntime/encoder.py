"""Encoder on ONNX Runtime: log-mel in, LLM-width features out, one graph with the adapter inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
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
        n_mels, most = self._spec.front_end.n_mels, 2 * self._spec.encoder.context
        if mel.ndim != 2 or len(mel) != n_mels or not 2 <= mel.shape[1] <= most or mel.shape[1] % 2:
            raise EngineError(
                f"the encoder takes log-mel [{n_mels}, t] with t even, 2 to {most}, not {list(mel.shape)}; "
                "split the audio"
            )
        wanted = min(wanted or mel.shape[1] // 2, mel.shape[1] // 2)
        feed = {"mel": np.ascontiguousarray(mel[None], np.float32)}
        if self._cuts:
            feed["wanted"] = np.array([wanted])
        with interruptible(interrupt, "the encoder failed", "try a shorter window or fewer threads") as options:
            features: F32 = self._session.run(["features"], feed, options)[0][0]
        return features[:wanted]

    def close(self) -> None:
        """Nothing is held beyond the session, which goes with this object."""
