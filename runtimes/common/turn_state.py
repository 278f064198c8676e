"""One turn's KV caches and how full they are, the same for every engine, and what may be asked of them.

The error texts of `LanguageModel` that do not depend on the engine are here, and nowhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from edgeomni.arrays import F32, I32
from edgeomni.errors import EngineError

CachesT = TypeVar("CachesT")
"""What an engine keeps keys and values in."""


class Hidden(NamedTuple):
    """Normed hidden of the last position: `text` [rows, D], and `audio`, which with a TTS adapter is its [1, D]."""

    text: F32
    audio: F32


@dataclass(eq=False)
class TurnState(Generic[CachesT]):
    """KV caches of one turn: `length` frames of `rows` active rows are in them, and room is for `capacity`.

    `max_rows` rows were asked for at its start.
    """

    caches: CachesT
    capacity: int
    max_rows: int
    length: int = 0
    rows: int = 1

    def check_ids(self, ids: I32) -> None:
        """Raises EngineError unless `ids` [rows, K+1, t] are of the active rows, and their frames have room."""
        rows, _, frames = ids.shape
        if rows != self.rows or not frames:
            raise EngineError(f"ids have {rows} row(s) of {frames} frames, but {self.rows} row(s) are active")
        if self.length + frames > self.capacity:
            raise EngineError(f"the cache holds {self.capacity} frames; {self.length} + {frames} are too many")

    def next_row(self) -> int:
        """The row that a fork fills. Raises EngineError where there is no room for one more."""
        if self.max_rows < self.rows + 1:
            raise EngineError(f"the state was started for {self.max_rows} row(s), so it cannot be forked")
        return self.rows

    def check_last(self, row: int) -> None:
        """Raises EngineError unless `row` can be dropped."""
        if row != self.rows - 1 or row == 0:
            raise EngineError(f"only the last of several rows can be dropped, not row {row} of {self.rows}")


def check_start(rows: int, max_frames: int, context: int, most_rows: int | None = None) -> None:
    """Raises EngineError unless an export of `context` frames can start so large a state.

    `most_rows`: what its caches hold; None where they are made for any number of rows.
    """
    if not 1 <= max_frames <= context:
        raise EngineError(f"max_frames {max_frames}: this export holds 1 to {context} frames")
    if most_rows is not None and not 1 <= rows <= most_rows:
        raise EngineError(f"a state has 1 to {most_rows} rows, not {rows}")


def check_audio_row(row: int, rows_with_audio: int) -> None:
    """Raises EngineError for a row that no audio logits can be had of."""
    if row >= rows_with_audio:
        raise EngineError(f"row {row} has no audio logits: the TTS adapter runs on row 0 only")


def taken(spare: deque[CachesT], fits: Callable[[CachesT], bool]) -> CachesT | None:
    """The first caches of `spare` that fit, taken out of it; None where none do.

    Other threads may put caches into `spare` and take some out meanwhile.
    """
    for _ in range(len(spare)):
        try:
            caches = spare.popleft()
        except IndexError:  # another thread took it
            return None
        if fits(caches):
            return caches
        spare.append(caches)
    return None
