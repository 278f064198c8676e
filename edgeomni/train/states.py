"""Saved states of a run: which of them are whole, and which one a run goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

PREFIX = "checkpoint"
"""Of the folders of states, as transformers names them: checkpoint-200."""
COMPLETE = "complete"
"""The file that is written into a saved state last: a state without it was cut off, and is not resumed from."""


def mark_whole(folder: Path, step: int) -> None:
    """Says that everything of the state of that step has been written."""
    (folder / f"{PREFIX}-{step}" / COMPLETE).touch()


def remove_cut_off(folder: Path) -> None:
    """Removes the saved states that are not whole."""
    for state in folder.glob(f"{PREFIX}-*"):
        if not (state / COMPLETE).exists():
            shutil.rmtree(state)


def last_whole_state(folder: Path) -> Path | None:
    """The newest saved state that was written to its end; None where there is none."""
    found = [p.parent for p in folder.glob(f"{PREFIX}-*/{COMPLETE}")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
