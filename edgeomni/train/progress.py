"""How far a training run is: a bar on a terminal, plain lines every few seconds anywhere else, both on stderr."""

from __future__ import annotations

from datetime import timedelta
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from ..printing import say

LINE_EVERY_S = 10.0


class Progress:
    """Shows steps, loss, tokens per second and the time that is left. A token is one LLM frame, padding included."""

    def __init__(self, console: Console | None = None, title: str = "train", every_s: float = LINE_EVERY_S) -> None:
        self._out = console or Console(stderr=True, highlight=False)
        self._title, self._every_s = title, every_s
        self._bar: Bar | None = None
        self._total, self._first, self._began = 0, 0, 0.0
        self._due, self._unsaid = 0.0, ""

    def start(self, total: int, done: int = 0) -> None:
        """Begins to count: `total` steps, of which `done` were made before (by the run that is resumed)."""
        self._total, self._first, self._began = total, done, perf_counter()
        self._due, self._unsaid = self._began, ""
        if self._out.is_terminal:
            columns = TextColumn(self._title, markup=False), BarColumn(), TextColumn("{task.description}", markup=False)
            self._bar = Bar(*columns, console=self._out)
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def update(self, step: int, loss: float, frames: int) -> None:
        """After `step` steps: the loss, and the LLM frames computed since `start`."""
        said = self._figures(step, loss, frames)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=said)
            return
        self._unsaid = said
        if perf_counter() >= self._due:
            self._line()

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        say(self._out, text)

    def stop(self) -> None:
        """Takes the bar away, or says the last figures that no line has said. May be called at any time."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._unsaid:
            self._line()

    def _line(self) -> None:
        say(self._out, f"{self._title}: {self._unsaid}")
        self._due, self._unsaid = perf_counter() + self._every_s, ""

    def _figures(self, step: int, loss: float, frames: int) -> str:
        spent, made = perf_counter() - self._began, step - self._first
        said = f"step {step}/{self._total}, loss {loss:.4g}"
        if spent <= 0 or made <= 0:
            return said
        left = timedelta(seconds=round((self._total - step) * spent / made))
        return f"{said}, {frames / spent:,.0f} tokens/s, {left} left"
