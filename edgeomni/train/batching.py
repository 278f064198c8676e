"""Which samples make up each batch: tasks mixed by weights, lengths close together, and the same again for a seed.

Draws are numbered from 0 on. Tijdeman's schedule ("The chairman assignment problem", Discrete Mathematics 32, 1980)
gives each draw its task, so that after any number of draws every task is within one draw of its share, and every batch
mixes the tasks. Over a pool of batches the draws of each task are sorted by length and dealt out, so that the longest
of every task meet in one batch; the batches of a pool come in a shuffled order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ..arrays import I64
from ..errors import TrainError
from ..spec import TASKS, Task

POOL = 16
"""Batches whose draws are sorted together, before `max_frames` makes more of them."""
_ORDER, _POOL = 0, 1
"""What a random generator is for; part of its seed."""


@dataclass(frozen=True)
class Draw:
    """One place in a batch: the sample's index, the task it serves, and the draw's number (seeds augmentation)."""

    index: int
    task: Task
    number: int


Batch = list[Draw]


@dataclass(frozen=True)
class BatchPlan:
    """An endless, repeatable sequence of batches.

    `members[task]`: indices of the samples that can serve a task; `lengths[task]`: LLM frames (prompt and answer) of
    each of them. `weights[task]`: share of the draws, in any unit; a task without a weight is not drawn. `batch`:
    samples per batch. `max_frames`: a batch holds fewer samples where its longest length times its size would exceed
    this. `pool`: batches over which lengths are sorted. Raises TrainError for what cannot be planned.
    """

    lengths: Mapping[Task, Sequence[int]]
    members: Mapping[Task, Sequence[int]]
    weights: Mapping[Task, float]
    batch: int
    seed: int
    max_frames: int | None = None
    pool: int = POOL
    shares: dict[Task, float] = field(init=False)
    """The weights of the tasks that are drawn, adding up to 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", _shares(self.weights))
        if self.batch < 1 or self.pool < 1:
            raise TrainError(f"batch {self.batch} and pool {self.pool} must be 1 or more")
        for task in self.shares:
            self._check(task)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` on, without end. Planning those before takes about 0.1 ms each."""
        if start < 0:
            raise TrainError(f"batches are numbered from 0 on; there is no batch {start}")
        return islice(self._all(), start, None)

    def _all(self) -> Iterator[Batch]:
        draws = self._draws()
        number = 0
        while True:
            pool = list(islice(draws, self.batch * self.pool))
            rng = np.random.default_rng([self.seed, _POOL, number])
            cut = [part for batch in self._dealt(pool) for part in self._cut(batch)]
            yield from (cut[i] for i in rng.permutation(len(cut)))
            number += 1

    def _draws(self) -> Iterator[tuple[int, Draw]]:
        """Every draw with its length: each task goes through its samples in a new order each time."""
        orders = {task: self._order(task) for task in self.shares}
        for number, task in enumerate(_schedule(self.shares)):
            place = next(orders[task])
            yield self.lengths[task][place], Draw(int(self.members[task][place]), task, number)

    def _order(self, task: Task) -> Iterator[int]:
        """Places within members[task] without end; every place comes once before any comes again."""
        number = 0
        while True:
            rng = np.random.default_rng([self.seed, _ORDER, TASKS.index(task), number])
            order: I64 = rng.permutation(len(self.members[task]))
            yield from order.tolist()
            number += 1

    def _dealt(self, pool: list[tuple[int, Draw]]) -> Iterator[list[tuple[int, Draw]]]:
        """The draws of a pool as batches of the same tasks as they were drawn in, the longest of each task first."""
        by_length = sorted(pool, key=lambda item: -item[0])
        waiting = {task: deque(item for item in by_length if item[1].task == task) for task in self.shares}
        for start in range(0, len(pool), self.batch):
            drawn = pool[start : start + self.batch]
            yield [waiting[draw.task].popleft() for _, draw in drawn]

    def _cut(self, batch: list[tuple[int, Draw]]) -> list[Batch]:
        """The batch, in parts where it would hold too many padded frames."""
        left, parts = sorted(batch, key=lambda item: -item[0]), []
        while left:
            room = len(left) if self.max_frames is None else min(len(left), self.max_frames // left[0][0])
            parts.append([draw for _, draw in left[:room]])
            left = left[room:]
        return parts

    def _check(self, task: Task) -> None:
        members, lengths = self.members.get(task, ()), self.lengths.get(task, ())
        if not len(members):
            raise TrainError(f"task {task} has a weight but no samples; give it samples, or the weight 0")
        if len(lengths) != len(members):
            raise TrainError(f"task {task} has {len(members)} samples but {len(lengths)} lengths")
        longest = int(max(lengths))
        if min(lengths) < 1:
            raise TrainError(f"task {task} has a sample of {min(lengths)} frames; each needs 1 or more")
        if self.max_frames is not None and longest > self.max_frames:
            raise TrainError(
                f"task {task} has a sample of {longest} frames, more than max_frames {self.max_frames} allows for a "
                "whole batch; raise max_frames, or take the sample out"
            )


class PlannedBatches:
    """A torch `batch_sampler` over a plan: `batches` batches, from number `start` on.

    `start` may be set before each pass; len() stays the number of batches. Batches may differ in size, which
    accelerate is told by `batch_size` None; `drop_last` makes it give every process equally many whole batches.
    """

    batch_size: int | None = None
    drop_last = True

    def __init__(self, plan: BatchPlan, batches: int, start: int = 0) -> None:
        self.plan, self.count, self.start = plan, batches, start

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.plan.batches(self.start), self.count)


def _shares(weights: Mapping[Task, float]) -> dict[Task, float]:
    """In the order of TASKS, so that a plan does not depend on the order in which weights were written."""
    if unknown := [name for name in weights if name not in TASKS]:
        raise TrainError(f"there is no task {unknown[0]!r} to give a weight; the tasks are {', '.join(TASKS)}")
    for task, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise TrainError(f"task {task} has the weight {weight}; it must be a finite number, 0 or more")
    total = math.fsum(weights.values())
    if not total:
        raise TrainError("no task has a weight above 0, so there is nothing to train on; set one")
    return {task: weights[task] / total for task in TASKS if weights.get(task)}


def _schedule(shares: Mapping[Task, float]) -> Iterator[Task]:
    """Tijdeman's schedule: of the tasks that may be drawn again, the one that has to be drawn soonest.

    Task i may be drawn as draw t when share_i * t - drawn_i >= slack, slack = 1 / (2n - 2); it has to be before
    share_i * t exceeds drawn_i + 1 - slack. No task is ever further than 1 - slack from its share.
    """
    slack = 1 / (2 * max(2, len(shares)) - 2)
    drawn = dict.fromkeys(shares, 0)
    t = 0
    while True:
        t += 1
        free = [task for task in shares if shares[task] * t - drawn[task] >= slack - 1e-9]
        task = min(free, key=lambda name: (drawn[name] + 1 - slack) / shares[name])
        drawn[task] += 1
        yield task
