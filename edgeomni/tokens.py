"""Layer shift, delay pattern, and streams <-> codec frames. Pure functions on numpy arrays.

Delay pattern (arXiv 2408.16725, section 3.2): audio stream k starts k+1 frames after the text stream, so the ids of
codec frame f stand on a diagonal: stream k's is in LLM frame f + k + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .arrays import I32, I64
from .spec import CodecSpec, TokenLayout


def shift_audio(layout: TokenLayout, ids: NDArray[np.integer]) -> I32:
    """Unshifted audio ids [K, ...] -> rows of the joint vocabulary [K, ...]."""
    shifts = np.array([layout.shift(k) for k in range(layout.streams)], np.int32)
    return (ids + shifts.reshape(-1, *[1] * (ids.ndim - 1))).astype(np.int32)


def audio_constant(layout: TokenLayout, unshifted: int, length: int = 1) -> I32:
    """The same unshifted audio id on every stream, shifted: [K, length]."""
    return shift_audio(layout, np.full((layout.streams, length), unshifted, np.int32))


def complete_frames(frames: int, streams: int) -> int:
    """Codec frames that are complete after `frames` LLM frames."""
    return max(0, frames - streams)


def undelay(streams: NDArray[np.integer]) -> I64:
    """Audio streams [K, frames] -> codec frames [max(0, frames-K), K], read along the diagonal."""
    k, frames = streams.shape
    n = complete_frames(frames, k)
    return np.stack([streams[i, i + 1 : i + 1 + n] for i in range(k)], axis=1).astype(np.int64)


def delay(codec_frames: NDArray[np.integer], pad: int, frames: int | None = None) -> I64:
    """Codec frames [n, K] -> audio streams [K, frames] (default n+K), `pad` where no frame reaches."""
    n, k = codec_frames.shape
    out = np.full((k, n + k if frames is None else frames), pad, np.int64)
    for i in range(k):
        room = out[i, i + 1 : i + 1 + n]
        room[:] = codec_frames[: len(room), i]
    return out


def frames_to_codes(codec_frames: NDArray[np.integer], codec: CodecSpec) -> list[I64]:
    """Codec frames [n, K] -> an array per level, [n * ids_per_level] (SNAC 24 kHz: l0; l1,l4; l2,l3,l5,l6)."""
    level = np.array(codec.level_of_stream)
    return [
        np.ascontiguousarray(codec_frames[:, level == i], np.int64).reshape(-1) for i in range(len(codec.vq_strides))
    ]


def codes_to_frames(codes: Sequence[NDArray[np.integer]], codec: CodecSpec) -> I64:
    """Inverse of `frames_to_codes`."""
    level = np.array(codec.level_of_stream)
    out = np.empty((len(codes[0]) // codec.ids_per_level[0], codec.streams), np.int64)
    for i, per_frame in enumerate(codec.ids_per_level):
        out[:, level == i] = np.asarray(codes[i]).reshape(-1, per_frame)
    return out
