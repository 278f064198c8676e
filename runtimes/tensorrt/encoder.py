"""Encoder on TensorRT: log-mel in, LLM-width features out, one engine with the adapter inside."""

from __future__ import annotations

import numpy as np

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.encoder_window import wanted_features
from edgeomni.runtimes.tensorrt.engine import Shape
from edgeomni.runtimes.tensorrt.memory import Block
from edgeomni.runtimes.tensorrt.opening import Engines
from edgeomni.spec import OmniSpec


class TrtEncoder:
    """Fulfils components.Encoder. Calls of several threads come one after another."""

    def __init__(self, spec: OmniSpec, engines: Engines) -> None:
        self._spec, self._engines, self._device = spec, engines, engines.device
        with engines.opening():
            engine = engines.open("encoder")
            n_mels, most = spec.front_end.n_mels, 2 * spec.encoder.context
            engine.need_shapes({"mel": (1, n_mels, -1), "features": (1, -1, spec.body.width)})
            self._most = engine.most("mel", 2, {"mel": (1, n_mels, -1)})
            if self._most != most:
                raise EngineError(f"encoder: the engine takes {self._most} mel frames, not {most}; export again")
            self._varies = -1 in engine.tensors["mel"].shape
            arena, tensors = engines.arena, engine.tensors
            self._mel = Block(arena, {"mel": ((1, n_mels, most), tensors["mel"].numbers)})
            shape = (1, most // 2, spec.body.width)
            self._features = Block(arena, {"features": (shape, tensors["features"].numbers)})
            shapes: dict[str, Shape] = {"mel": (1, n_mels, most)} if self._varies else {}
            self._context = engine.context(arena, engines.scratch(), shapes, fixed=not self._varies)
            self._context.bind("mel", self._mel.address("mel"))
            self._context.bind("features", self._features.address("features"))
            self._run(np.zeros((n_mels, most), np.float32), 0)  # so that no question waits for preparations

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> the first `wanted` features [wanted or t // 2, D].

        An interrupt is seen before the run, which is not stopped. Raises EngineError for another shape.
        """
        wanted, frames = wanted_features(mel, wanted, self._spec), mel.shape[1]
        if not self._varies and frames != self._most:
            raise EngineError(f"this engine takes windows of {self._most} mel frames alone, not {frames}; export again")
        if interrupt is not None:
            interrupt.check()
        with self._engines.using():
            return self._run(mel, wanted)

    def close(self) -> None:
        """Frees the engine."""
        with self._device.lock:
            self._engines.close()

    def _run(self, mel: F32, wanted: int) -> F32:
        device, width = self._device, self._spec.body.width
        device.synchronize()
        mels, features = self._mel.host["mel"].reshape(-1), self._features.host["features"].reshape(-1)
        mels[: mel.size] = mel.reshape(-1)
        self._mel.upload(mel.size * mels.itemsize)
        if self._varies:
            self._context.reshape("mel", (1, *mel.shape))
        self._context.enqueue()
        if wanted:
            self._features.download(wanted * width * features.itemsize)
        device.synchronize()
        return features[: wanted * width].reshape(wanted, width).astype(np.float32)
