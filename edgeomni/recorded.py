"""What a model heard and read while it answered questions: on these an export measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arrays import F32

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recorded:
    """`sounds`: the spoken questions, float32 [samples] at the front end's rate. `inputs`: what the body read in each
    turn, float32 [T, D]."""

    sounds: Sequence[F32]
    inputs: Sequence[Tensor]
