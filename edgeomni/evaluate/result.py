"""What an evaluation found: one row per sample and task, the figures of each task, and what could not be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ..spec import TASKS, Task
from . import metrics
from .metrics import Share

TIMES = ("ttft", "ttfa", "total", "audio", "rtf", "rtf_turn")
"""Timings of a turn (TurnEnd.timings) whose medians are told."""


@dataclass(frozen=True)
class Unusable:
    """A sample that could not be used for `task` ("": for any), where it stands, and why."""

    where: str
    task: str
    why: str


@dataclass(frozen=True)
class Row:
    """One sample's answer in one task. `index` is the sample's place in the test set.

    `heard` is what the recogniser heard in the answer's sound, `heard_reference` in the reference's, None where there
    was no recogniser or no such sound. `shuffled` is the other sample's reference that the floor scores `heard` by.
    `ended`: why the answer ended ("eoa", "eot", "length").
    """

    index: int
    task: Task
    where: str
    reference: str
    text: str
    heard: str | None
    heard_reference: str | None
    shuffled: str | None
    ended: str
    scores: Mapping[str, Share]
    timings: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scores": {name: list(share) for name, share in self.scores.items()}}


@dataclass(frozen=True)
class Metric:
    """A figure: the quotient of sums over `samples` samples, 1 is 100 %. More is better unless it counts errors."""

    value: float
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """`source` and `recogniser` ("" for none) by name; `left_out`: answers that the recogniser cannot hear."""

    source: str
    rows: tuple[Row, ...]
    unusable: tuple[Unusable, ...] = ()
    recogniser: str = ""
    left_out: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that were evaluated, in the order of TASKS."""
        return tuple(task for task in TASKS if any(row.task == task for row in self.rows))

    def of(self, task: Task) -> list[Row]:
        return [row for row in self.rows if row.task == task]

    def metrics(self, task: Task) -> dict[str, Metric]:
        """Name -> figure, of those that this task has ("exact", "heard_wer", "ceiling_exact")."""
        rows = self.of(task)
        return {
            name: Metric(share.got / share.of, sum(name in row.scores for row in rows))
            for name, share in metrics.pooled(row.scores for row in rows).items()
        }

    def timings(self, task: Task) -> dict[str, float]:
        """Medians over the answers, in seconds (rtf and rtf_turn: per second of sound), of what was measured."""
        rows = self.of(task)
        return {name: median(t) for name in TIMES if (t := [r.timings[name] for r in rows if name in r.timings])}

    def to_dict(self) -> dict[str, Any]:
        """For --json; the rows are left out."""
        return {
            "source": self.source,
            "recogniser": self.recogniser or None,
            "left_out": dict(self.left_out),
            "tasks": {task: self._task(task) for task in self.tasks},
            "unusable": [asdict(entry) for entry in self.unusable],
        }

    def _task(self, task: Task) -> dict[str, Any]:
        rows = self.of(task)
        return {
            "samples": len(rows),
            "cut_off": sum(row.ended == "length" for row in rows),
            "metrics": {name: asdict(metric) for name, metric in self.metrics(task).items()},
            "timings": self.timings(task),
        }
