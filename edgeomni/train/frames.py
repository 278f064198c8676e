"""One sample as the model is to see it and say it: input ids and labels, frame by frame. Numpy alone.

    position      0 .. P-1              P-1        P         P+1       ...
    input         the prompt            (its last) frame 0   frame 1   ...
    label         none, none, ...       frame 0    frame 1   frame 2   ...

Frame t of an answer with n codec frames, as the generation loop emits and stops it (generate.py, tokens.py): the text
stream holds the answer's ids, then eot, then pad_t; audio stream k holds pad_a up to frame k, codec frame f in frame
f + k + 1, eoa after the last one, then pad_a. The last stream's eoa ends the answer. The pads after eot are no labels,
since the loop forces them; those of the audio streams are, since the loop feeds them back as the model chose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import I32, I64
from ..errors import DataError
from ..prompts import Prompt
from ..spec import AUDIO_OUT, TokenLayout
from ..tokens import audio_constant, delay, shift_audio

IGNORED = -100
"""The label of what is left out of the loss, as torch's cross_entropy has it."""


@dataclass(frozen=True, eq=False)
class Frames:
    """`ids` int32 [K+1, T] in the joint vocabulary, audio streams first, text last. `labels` int64 [K+1, T]: audio ids
    unshifted, text ids, IGNORED where nothing is learned. Features belong to positions `feature_start`.. ."""

    ids: I32
    labels: I64
    feature_start: int

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])


def frames_of(
    layout: TokenLayout, task: str, prompt: Prompt, answer_ids: Sequence[int], codec_frames: I64 | None = None
) -> Frames:
    """Prompt (one row) and answer -> one training sequence. `codec_frames` int64 [n, K], for aa and ta.

    Raises DataError for ids outside the text vocabulary or the codebook, an answer without sound where the task wants
    it, and a text so long that it would be cut off by the end of its sound.
    """
    _check_text(layout, answer_ids)
    text = np.array([*answer_ids, layout.eot], np.int64)
    if task in AUDIO_OUT:
        streams, audio_labels = _audio_answer(layout, codec_frames, len(text))
    else:
        streams = np.full((layout.streams, len(text)), layout.pad_a, np.int64)
        audio_labels = np.full_like(streams, IGNORED)
    frames = streams.shape[1]
    text_ids = np.full(frames, layout.pad_t, np.int64)
    text_labels = np.full(frames, IGNORED, np.int64)
    text_ids[: len(text)] = text_labels[: len(text)] = text
    answer = np.concatenate([shift_audio(layout, streams), text_ids[None]]).astype(np.int32)
    labels = np.full((layout.streams + 1, prompt.length - 1), IGNORED, np.int64)
    return Frames(
        np.concatenate([prompt.ids[0], answer[:, :-1]], axis=1),
        np.concatenate([labels, np.concatenate([audio_labels, text_labels[None]])], axis=1),
        prompt.feature_start,
    )


def answer_frames(layout: TokenLayout, task: str, text_ids: int, codec_frames: int = 0) -> int:
    """LLM frames of an answer: what `frames_of` labels."""
    return codec_frames + layout.streams + 1 if task in AUDIO_OUT else text_ids + 1


def padding(layout: TokenLayout) -> I32:
    """The frame [K+1, 1] that fills a batch up behind a shorter sequence."""
    return np.concatenate([audio_constant(layout, layout.pad_a), np.array([[layout.pad_t]], np.int32)])


def _audio_answer(layout: TokenLayout, codec_frames: I64 | None, text: int) -> tuple[I64, I64]:
    """Unshifted ids of the audio streams [K, n + K + 1], and the same as labels."""
    if codec_frames is None or not len(codec_frames):
        raise DataError("the task speaks, but the answer has no sound")
    n, k = codec_frames.shape
    if k != layout.streams or codec_frames.min() < 0 or codec_frames.max() >= layout.codebook_size:
        raise DataError(
            f"codec frames of {k} ids from {codec_frames.min()} to {codec_frames.max()} do not fit a codec with "
            f"{layout.streams} ids per frame below {layout.codebook_size}; they were made with another codec"
        )
    if text > n + k:
        raise DataError(
            f"the answer's text has {text} ids with its end, but its sound of {n} codec frames ends after {n + k} "
            "frames; the text would be cut off"
        )
    closed = np.concatenate([codec_frames, np.full((1, k), layout.eoa)]).astype(np.int64)
    streams = delay(closed, layout.pad_a, n + k + 1)
    return streams, streams.copy()


def _check_text(layout: TokenLayout, ids: Sequence[int]) -> None:
    if bad := [i for i in ids if not 0 <= i < layout.eot]:
        raise DataError(f"the answer's text ids {bad[:5]} lie outside the {layout.eot} words of the vocabulary")
