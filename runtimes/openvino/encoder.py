"""Encoder on OpenVINO: log-mel in, LLM-width features out, one model with the adapter inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.openvino.models import ModelFactory, output, run
from edgeomni.spec import OmniSpec


class OvEncoder:
    """Fulfils components.Encoder."""

    def __init__(self, bundle_path: Path, component: Component, spec: OmniSpec, models: ModelFactory) -> None:
        self._spec = spec
        self._model = models.open(bundle_path / component.graphs["encoder"].path)

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> the first `wanted` features [wanted or t // 2, D].

        Setting `interrupt` from another thread ends the run after the layer that it is in, with Interrupted.
        Raises EngineError for another shape.
        """
        n_mels, most = self._spec.front_end.n_mels, 2 * self._spec.encoder.context
        if mel.ndim != 2 or len(mel) != n_mels or not 2 <= mel.shape[1] <= most or mel.shape[1] % 2:
            raise EngineError(
                f"the encoder takes log-mel [{n_mels}, t] with t even, 2 to {most}, not {list(mel.shape)}; "
                "split the audio"
            )
        wanted = min(wanted or mel.shape[1] // 2, mel.shape[1] // 2)
        request = self._model.create_infer_request()
        feed = {"mel": np.ascontiguousarray(mel[None], np.float32), "wanted": np.array([wanted], np.int64)}
        run(request, feed, "the encoder", interrupt)
        return output(request, "features")[0]

    def close(self) -> None:
        """Nothing is held beyond the model, which goes with this object."""
