"""Feeds a prompt to a language model, by pieces, the part that its rows share only once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import I32
from .components import Features, HiddenT, LanguageModel, StateT, features_between
from .interrupt import Interrupt

PREFILL_FRAMES = 64
"""Prompt frames fed at once: so many that engines compute at full speed, so few that a cancel need not wait long."""


def prefill(
    llm: LanguageModel[StateT, HiddenT],
    ids: I32,
    features: Sequence[Features],
    state: StateT,
    interrupt: Interrupt | None = None,
) -> HiddenT:
    """Feeds a prompt, int32 [rows, K+1, T] with rows 1 or 2, to an empty state; returns the last position's hidden.

    Two rows differ only in their last position, so the positions before it are computed once, in one row, and their
    KV cache is copied. The prompt goes in by pieces of `PREFILL_FRAMES`. Raises Interrupted before the next piece
    once `interrupt` is set, and in the middle of one where the engine can stop there.
    """
    rows, _, length = ids.shape
    shared = length if rows == 1 else length - 1
    interrupt = interrupt or Interrupt()
    for start in range(0, shared, PREFILL_FRAMES):
        interrupt.check()
        stop = min(shared, start + PREFILL_FRAMES)
        piece = np.ascontiguousarray(ids[:1, :, start:stop])
        hidden = llm.forward(piece, features_between(features, start, stop), state, interrupt)
    if rows == 1:
        return hidden
    llm.fork(state)
    last = features_between(features, shared, length)
    return llm.forward(np.ascontiguousarray(ids[:, :, shared:]), last, state)
