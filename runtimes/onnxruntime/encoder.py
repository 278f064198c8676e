"""Encoder on ONNX Runtime: log-mel in, LLM-width features out, one graph with the adapter inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, translated
from edgeomni.spec import OmniSpec


class OrtEncoder:
    """Fulfils components.Encoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, sessions: SessionFactory) -> None:
        self._spec = spec
        dynamic = component.meta["flavour"] == "ort" and "int8_dynamic" in component.scheme.values()
        self._session = sessions.open(bundle_path / component.graphs["encoder"]["path"], dynamic=dynamic)
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
        return self._run(feed, interrupt or Interrupt())[:wanted]

    def close(self) -> None:
        """Nothing is held beyond the session, which goes with this object."""

    def _run(self, feed: dict[str, Any], interrupt: Interrupt) -> F32:
        run = ort.RunOptions()
        try:
            with (
                interrupt.stopping(lambda: setattr(run, "terminate", True)),
                translated("the encoder failed", "try a shorter window or fewer threads"),
            ):
                features: F32 = self._session.run(["features"], feed, run)[0][0]
        except EngineError as exc:
            if interrupt.is_set():  # ONNX Runtime reports a terminated run as a failed one
                raise Interrupted from exc
            raise
        return features
