"""Choosing an audio frame with parallel heads: every stream's logits come from the same hidden, at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from edgeomni.arrays import F32, F64, I64
from edgeomni.sampling import Sampling, choose_frame

HiddenT = TypeVar("HiddenT")


class ParallelHeads(ABC, Generic[HiddenT]):
    """`LanguageModel.frame_ids` on top of `audio_logits`, for engines that do not choose on their device."""

    @abstractmethod
    def audio_logits(self, hidden: HiddenT, row: int, given: I64 | None = None) -> F32:
        """[K, audio_vocab] of that row; `given` is ignored, since no stream depends on another."""

    def frame_ids(self, hidden: HiddenT, row: int, text_id: int, draws: F64, rule: Sampling) -> I64:
        """See components.LanguageModel. Parallel heads do not depend on `text_id`."""
        return choose_frame(self.audio_logits(hidden, row), draws, rule)
