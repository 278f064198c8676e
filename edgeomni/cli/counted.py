"""How far the work on many samples has come: a bar on a terminal, plain lines anywhere else, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Counted = Callable[[int, int], None]
"""Is told how many of how many are done."""
_LINES = 10


@contextmanager
def counted_progress(title: str, unit: str = "samples") -> Iterator[Counted]:
    """A `progress` for what counts its steps. Without a terminal it prints about ten lines in all."""
    if not sys.stderr.isatty():
        yield _lines(title, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(TextColumn(title), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str, unit: str) -> Counted:
    shown = 0

    def tell(done: int, total: int) -> None:
        nonlocal shown
        if total and (tenth := done * _LINES // total) > shown:
            shown = tenth
            print(f"{title}: {done} of {total} {unit}", file=sys.stderr, flush=True)

    return tell
