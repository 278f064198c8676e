"""Which samples of a test set are asked in which task, and which cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from ..data.sample import Sample
from ..errors import UsageError
from ..spec import AUDIO_OUT, TASKS, OmniSpec, Task
from .result import Unusable

logger = logging.getLogger("edgeomni")


def chosen_samples(
    samples: Sequence[Sample], tasks: Collection[Task] | None, spec: OmniSpec, limit: int | None = None
) -> tuple[dict[Task, list[int]], list[Unusable]]:
    """Task -> places of its samples, at most `limit` of each, and what could not be used.

    Raises UsageError for tasks that do not exist or that the checkpoint does not have, and where nothing is left.
    """
    wanted, unusable = _wanted(tasks, spec), list[Unusable]()
    chosen: dict[Task, list[int]] = {task: [] for task in TASKS}
    for index, sample in enumerate(samples):
        own, why = _tasks_of(sample, None if tasks is None else wanted)
        if why:
            note(unusable, Unusable(sample.where, sample.task or "", why))
        for task in own:
            chosen[task].append(index)
    if lacking := [task for task in TASKS if chosen[task] and task not in wanted]:
        logger.warning("samples for %s are not asked: the checkpoint has no such task", " and ".join(lacking))
    found = {task: chosen[task][:limit] for task in wanted if chosen[task]}
    if not found and not unusable:
        raise UsageError(f"none of {len(samples)} sample(s) is for task {' or '.join(wanted)}; give others")
    return found, unusable


def _wanted(tasks: Collection[Task] | None, spec: OmniSpec) -> list[Task]:
    if tasks is None:
        return list(spec.tasks)
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise UsageError(f"unknown task(s) {', '.join(unknown)}; known are {', '.join(TASKS)}")
    if lacking := [task for task in TASKS if task in tasks and task not in spec.tasks]:
        raise UsageError(f"this checkpoint has no task {', '.join(lacking)}; it has {', '.join(spec.tasks)}")
    return [task for task in TASKS if task in tasks]


def _tasks_of(sample: Sample, asked: Collection[Task] | None) -> tuple[list[Task], str]:
    """The tasks that a sample takes part in, and why it cannot be used where it should be and is not.

    Unlike training, evaluation can do without a spoken answer, where the task is the sample's own or asked for.
    """

    def missing(task: Task) -> list[str]:
        return [field for field in sample.missing(task) if field != "answer_audio"]

    if sample.task is not None:
        if asked is not None and sample.task not in asked:
            return [], ""
        gaps = missing(sample.task)
        return ([], f"task {sample.task} needs {' and '.join(gaps)}") if gaps else ([sample.task], "")
    if asked is not None:
        return [task for task in asked if not missing(task)], ""
    own = list(sample.tasks())
    return own, "" if own else "its fields are too few for any task"


def sentences(samples: Sequence[Sample]) -> list[str]:
    """Every answer of the test set that may be spoken, once: what a recogniser with a grammar has to expect."""
    spoken = (s.answer for s in samples if s.task is None or s.task in AUDIO_OUT)
    return list(dict.fromkeys(answer for answer in spoken if answer.strip()))


def note(unusable: list[Unusable], entry: Unusable) -> None:
    """Adds an entry and warns of it."""
    logger.warning("%s: cannot be used%s: %s", entry.where, f" for {entry.task}" if entry.task else "", entry.why)
    unusable.append(entry)


def told(unusable: Sequence[Unusable]) -> str:
    """The first entry, for a message."""
    first = unusable[0]
    return f"the first is {first.where}: {first.why}"
