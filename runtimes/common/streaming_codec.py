"""What streaming a codec decoder needs besides an engine: holding short pushes, padding, noise, exact lengths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from edgeomni.arrays import F32, I64
from edgeomni.errors import EngineError
from edgeomni.spec import CodecSpec
from edgeomni.static_codec import piece_frames

KeptT = TypeVar("KeptT")
"""What the engine keeps of a stream between two pushes."""


@dataclass(frozen=True)
class Timing:
    """How a codec's decoder runs behind its input.

    After N latents it has given N * hop - lag_samples samples; noise block i has asked for
    N * noise[i][0] - noise[i][1] values. `first_push` and `push_multiple` count codec frames.
    """

    first_push: int
    push_multiple: int
    lag_samples: int
    noise: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Timing:
        """What the manifest says of an exported codec; `meta` is the component's."""
        noise = tuple((pace["scale"], pace["lag"]) for pace in meta["noise"])
        return cls(meta["first_push"], meta["push_multiple"], meta["lag_samples"], noise)


@dataclass
class Stream(Generic[KeptT]):
    """One answer's codec state: what the engine keeps (`kept`), and how far the stream has come."""

    kept: KeptT
    held: list[I64]
    """Ids per level that were given but not pushed yet."""
    frames: int = 0
    """Codec frames given."""
    pushed: int = 0
    """Latents pushed into the engine."""
    given: int = 0
    """Samples handed out."""
    ended: bool = False
    generators: list[np.random.Generator] = field(default_factory=list)


def noise_generator(seed: int, block: int) -> np.random.Generator:
    """Source of noise block `block`: its n-th value belongs to the n-th sample at that block, from the very first."""
    return np.random.Generator(np.random.PCG64([seed, block]))


class StreamingCodec(ABC, Generic[KeptT]):
    """CodecDecoder less its engine: joined pushes equal one offline decode, to the sample.

    Pushes may have any size: what is too short to start with, or no whole attention window, is held back until
    more comes.
    """

    def __init__(self, spec: CodecSpec, timing: Timing) -> None:
        self.spec, self.timing = spec, timing
        self.first_push, self.push_multiple = timing.first_push, timing.push_multiple

    @abstractmethod
    def _start(self) -> KeptT:
        """The engine's state of a new stream."""

    @abstractmethod
    def _push(self, codes: Sequence[I64], kept: KeptT, last: bool, noise: Sequence[F32] | None) -> tuple[F32, KeptT]:
        """Pushes codes (levels of the same, maybe zero, frames); noise[i] [n], or None for off -> samples, state."""

    def open(self, noise_seed: int | None = None) -> Stream[KeptT]:
        """A fresh stream; `noise_seed` switches the codec's noise on (SNAC; Mimi has none)."""
        blocks = range(len(self.timing.noise))
        generators = [] if noise_seed is None else [noise_generator(noise_seed, i) for i in blocks]
        return Stream(self._start(), [np.zeros(0, np.int64) for _ in self.spec.vq_strides], generators=generators)

    def decode(self, codes: Sequence[I64], state: Stream[KeptT], last: bool) -> F32:
        """codes[level] int64 [n * ids_per_level] -> the samples that became final, [samples] float32.

        Raises EngineError after `last`, or for levels that do not fit together.
        """
        self._take(codes, state)
        ready = self._ready(state, last)
        state.ended = last
        if ready is None:
            return np.zeros(0, np.float32)
        pieces = self._pieces(ready, started=state.pushed > 0)
        wave = np.concatenate([self._run(piece, state, last and piece is pieces[-1]) for piece in pieces])
        wave = wave[: state.frames * self.spec.frame_samples - state.given]
        state.given += len(wave)
        return wave

    def close(self) -> None:  # noqa: B027
        """Nothing to give back before the object goes."""

    def _take(self, codes: Sequence[I64], state: Stream[KeptT]) -> None:
        if state.ended:
            raise EngineError("this codec stream has ended; open() another one")
        per_level = self.spec.ids_per_level
        frames = {len(c) / n for c, n in zip(codes, per_level, strict=False)}
        if len(codes) != len(per_level) or len(frames) != 1 or not (count := frames.pop()).is_integer():
            raise EngineError(f"codes of {[len(c) for c in codes]} ids per level; a codec frame has {per_level}")
        state.held = [np.concatenate([h, c]).astype(np.int64) for h, c in zip(state.held, codes, strict=True)]
        state.frames += int(count)

    def _ready(self, state: Stream[KeptT], last: bool) -> list[I64] | None:
        """What of the held codes is pushed now; None for nothing."""
        per_level = self.spec.ids_per_level
        held = len(state.held[0]) // per_level[0]
        if last:
            started = state.pushed or held
            if not started or (not held and not self.timing.lag_samples):
                return None
            padding = -held % self.push_multiple
            return [np.pad(h, (0, padding * n)) for h, n in zip(state.held, per_level, strict=True)]
        frames = held // self.push_multiple * self.push_multiple
        if frames == 0 or (not state.pushed and frames < self.first_push):
            return None
        ready = [h[: frames * n] for h, n in zip(state.held, per_level, strict=True)]
        state.held = [h[frames * n :] for h, n in zip(state.held, per_level, strict=True)]
        return ready

    def _pieces(self, codes: Sequence[I64], started: bool) -> list[list[I64]]:
        """The codes cut into pieces of whole attention windows.

        The layers' signals then stay in the cache, which halves the time of a long answer's offline decode, and memory
        stays bounded.
        """
        per_level = self.spec.ids_per_level
        piece = piece_frames(self.spec, self.push_multiple)
        first = piece if started else max(piece, self.first_push)
        edges = [0, *range(first, len(codes[0]) // per_level[0], piece)]
        bounds = zip(edges, [*edges[1:], None], strict=True)
        return [
            [c[start * n : None if stop is None else stop * n] for c, n in zip(codes, per_level, strict=True)]
            for start, stop in bounds
        ]

    def _run(self, codes: Sequence[I64], state: Stream[KeptT], last: bool) -> F32:
        wave, state.kept = self._push(codes, state.kept, last, self._noise(state, len(codes[-1]), last))
        return wave

    def _noise(self, state: Stream[KeptT], latents: int, last: bool) -> list[F32] | None:
        """The noise that this push's samples meet at each block; counts latents as pushed."""
        before, state.pushed = state.pushed, state.pushed + latents
        if not state.generators:
            return None
        counts = [
            max(0, state.pushed * scale - (0 if last else lag)) - max(0, before * scale - lag)
            for scale, lag in self.timing.noise
        ]
        return [g.standard_normal(n, np.float32) for g, n in zip(state.generators, counts, strict=True)]
