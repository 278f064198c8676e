"""Codec frames as data files hold them -> int64 [frames, K]. K comes from the data; no codec is known here."""

from __future__ import annotations

import numpy as np

from ..arrays import I64
from ..errors import DataError
from ..schema import short


def codes_of(value: object) -> I64:
    """Frames of ids ([[id, ...], ...], K ids each) -> int64 [frames, K]. Raises DataError for all else."""
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError, TypeError) as exc:
        raise DataError("answer_codes holds frames of different lengths; each must have the codec's K ids") from exc
    if ids.dtype.kind != "i" or ids.ndim != 2 or not ids.size:
        raise DataError("answer_codes must be a list of frames, and each frame a list of K whole numbers")
    if ids.min() < 0:
        raise DataError(f"answer_codes holds {ids.min()}; ids of a codebook begin at 0")
    return np.ascontiguousarray(ids, np.int64)


def codes_of_text(text: str) -> I64:
    """VoiceAssistant-400K's `answer_snac` ("# id ... id # id ... id") -> int64 [frames, K].

    A "#" begins a frame. The ids of SNAC 24 kHz stand as levels 0, 1, 2, 2, 1, 2, 2, which is the order of the audio
    streams, each within its own codebook (no offsets): Mini-Omni's utils/snac_utils.py writes and reads them so.
    Raises DataError for text of another form.
    """
    before, *frames = text.split("#")
    if before.strip() or not frames:
        raise DataError(f"answer_snac begins with {short(text[:20])}; it must be '# id ... id # id ... id'")
    try:
        return codes_of([[int(one) for one in frame.split()] for frame in frames])
    except ValueError as exc:
        raise DataError("answer_snac holds something that is no id") from exc
    except DataError as exc:
        raise DataError(str(exc).replace("answer_codes", "answer_snac")) from exc
