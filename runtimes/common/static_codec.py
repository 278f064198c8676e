"""Pushing a codec decoder whose states have fixed sizes (exporters/tensorrt/codec.py), less its engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I64
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing
from edgeomni.spec import CodecSpec
from edgeomni.static_codec import sizes_of

StatesT = TypeVar("StatesT")
"""What the engine hands from one push to the next: the graph's outputs next.<layer>."""
UNKNOWN = 1 << 40
"""As the latents of an answer that has not ended: more than any has."""


@dataclass(frozen=True)
class Kept(Generic[StatesT]):
    """The engine's states (None: zeros, nothing was pushed) and the latents pushed so far."""

    states: StatesT | None
    pushed: int


class StaticCodec(StreamingCodec[Kept[StatesT]]):
    """CodecDecoder of a component in the format tensorrt; `meta` is the component's."""

    def __init__(self, spec: CodecSpec, meta: Mapping[str, Any]) -> None:
        super().__init__(spec, Timing.of(meta))
        self._sizes = sizes_of(spec, meta["first_push"], meta["push_multiple"], meta["lag_samples"])

    @abstractmethod
    def _compute(self, inputs: Mapping[str, NDArray[Any]], states: StatesT | None) -> tuple[F32, StatesT]:
        """Runs the graph once: inputs codes.<level>, pushed, total, noise.<block> -> wave [n], the next states."""

    def _start(self) -> Kept[StatesT]:
        return Kept(None, 0)

    def _push(
        self, codes: Sequence[I64], kept: Kept[StatesT], last: bool, noise: Sequence[F32] | None
    ) -> tuple[F32, Kept[StatesT]]:
        """At the end latents of padding are pushed besides, until what the decoder lags behind has come out."""
        given = len(codes[-1])
        latents = given + (self._sizes.flush if last else 0)
        inputs: dict[str, NDArray[Any]] = {
            "pushed": np.array([kept.pushed], np.int64),
            "total": np.array([kept.pushed + given if last else UNKNOWN], np.int64),
        }
        for level, (ids, stride) in enumerate(zip(codes, self.spec.vq_strides, strict=True)):
            inputs[f"codes.{level}"] = np.pad(ids, (0, latents // stride - len(ids)))
        for i, (scale, lag) in enumerate(self.timing.noise):
            values = np.zeros((1, 1, latents * scale), np.float32)
            if noise is not None:
                start = max(0, lag - kept.pushed * scale)  # positions before the answer's start have no noise
                values[0, 0, start : start + len(noise[i])] = noise[i]
            inputs[f"noise.{i}"] = values
        wave, states = self._compute(inputs, kept.states)
        before = max(0, self.timing.lag_samples - kept.pushed * self.spec.hop)
        end = given * self.spec.hop + self.timing.lag_samples if last else len(wave)
        return wave[before:end], Kept(states, kept.pushed + given)
