"""The sizes in which a codec decoder is pushed, which an exporter of fixed sizes and the runtimes agree on."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import CodecSpec

PIECE_SAMPLES = 8192
"""Longer pushes are run in pieces of about this many samples."""


@dataclass(frozen=True)
class Sizes:
    """Latents: a push holds a multiple of `unit`; `usual` is a piece of an answer, `largest` one with the flush.

    `flush`: latents of padding that bring out the rest of an answer, behind which the decoder lags.
    """

    unit: int
    usual: int
    flush: int

    @property
    def largest(self) -> int:
        return self.usual + self.flush


def piece_frames(spec: CodecSpec, push_multiple: int) -> int:
    """Codec frames that are pushed at once, at most."""
    return max(1, PIECE_SAMPLES // spec.frame_samples // push_multiple) * push_multiple


def sizes_of(spec: CodecSpec, first_push: int, push_multiple: int, lag_samples: int) -> Sizes:
    """The sizes of pushes of a decoder that lags by so many samples and first takes `first_push` codec frames."""
    coarsest = spec.vq_strides[0]
    unit = push_multiple * coarsest
    flush = -(-lag_samples // (spec.hop * unit)) * unit
    usual = max(first_push, piece_frames(spec, push_multiple))
    return Sizes(unit, usual * coarsest, flush)
