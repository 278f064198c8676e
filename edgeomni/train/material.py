"""What a run learns from: samples read, split, looked through, and mixed into a plan."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.readers import read_data
from ..data.sample import Sample
from ..errors import DataError, TrainError
from ..model.omni import OmniModel
from ..spec import TASKS, OmniSpec, Task
from ..text import Tokenizer
from .batching import Draw
from .codes import codec_digest
from .config import DataConfig, TrainConfig
from .dataset import Collator, Usable
from .prepared import is_prepared, read_prepared

logger = logging.getLogger("edgeomni")

Location = str | os.PathLike[str]
Data = Sequence[Sample] | Location | Sequence[Location]
"""Samples, or where they lie: what edgeomni.data.readers reads, or what `edgeomni data prepare` wrote."""


def read(data: Data, what: str, section: DataConfig, model: OmniModel) -> list[Sample]:
    """The samples of `data`, for that model; `what` is what messages call it.

    Raises DataError for data that cannot be used, TrainError where `data` names nothing.
    """
    sources: list[Any] = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    if not sources:
        raise TrainError(f"{what} names no data; give --data, or set it in the configuration")
    found: list[Sample] = []
    for source in sources:
        if isinstance(source, Sample):
            found.append(source)
        elif is_prepared(Path(source)):
            found += read_prepared(Path(source), model.spec, codec_digest(model.codec))
        else:
            found += read_data(source, section.format, max_bad=section.max_bad).samples
    return found


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from and samples to validate on, in their order; the same ones for the same seed."""
    count = round(share * len(samples))
    held = set(np.random.default_rng(seed).permutation(len(samples))[:count].tolist())
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]


def trained_spec(spec: OmniSpec, config: TrainConfig, samples: Sequence[Sample]) -> OmniSpec:
    """The spec of the trained checkpoint: its chat template, and as much history as the samples have."""
    turns = max((len(sample.history) for sample in samples), default=0)
    return replace(spec, chat=config.chat or spec.chat, history_turns=max(spec.history_turns, turns))


def check_stop_words(spec: OmniSpec, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError, before anything is trained, where the tokenizer lacks a stop word."""
    for word in spec.chat.stop_words:
        tokenizer.id_of(word)


def mix(config: TrainConfig, asked: Mapping[str, float], data: Usable) -> dict[Task, float]:
    """Task -> weight, of the tasks that have samples. `asked`: the tasks that the user named.

    Raises DataError where a task that was asked for has no samples, or none has.
    """
    empty = [task for task, weight in config.tasks.items() if weight and not data.members.get(task)]  # type: ignore[call-overload]
    if wanted := [task for task in empty if task in asked]:
        raise DataError(f"no sample serves task {', '.join(wanted)}; add samples, or take it out of tasks")
    weights = {task: config.tasks[task] for task in TASKS if config.tasks.get(task) and task not in empty}
    if not weights:
        raise DataError(
            f"no sample serves any task of stage {config.stage} ({', '.join(config.tasks)}); stage {config.stage} "
            "needs other data, or other tasks ([tasks] in the configuration)"
        )
    if empty:
        logger.warning("no sample serves task %s; the run goes on with %s", ", ".join(empty), ", ".join(weights))
    return weights


class HeldOut:
    """Fixed batches of held-out samples, task by task, sorted by length. Iterating makes them anew each time.

    `limit`: samples of each task at most, chosen by chance but always the same; 0 for all.
    """

    def __init__(self, data: Usable, collator: Collator, batch: int, limit: int = 0) -> None:
        self._data, self._collator, self._batch, self._limit = data, collator, batch, limit

    def __bool__(self) -> bool:
        return any(self._data.members.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for task, members in self._data.members.items():
            lengths = self._data.lengths[task]
            chosen = np.random.default_rng(0).permutation(len(members))[: self._limit or None].tolist()
            order = sorted(chosen, key=lambda i: (lengths[i], i))
            for start in range(0, len(order), self._batch):
                yield self._collator([Draw(members[i], task, 0) for i in order[start : start + self._batch]])


def fingerprint(data: Usable) -> dict[str, Any]:
    """What tells one set of samples from another: how many, and a hash of their places, tasks, texts and lengths."""
    whole = hashlib.sha256()
    for task, members in data.members.items():
        for index, length in zip(members, data.lengths[task], strict=True):
            sample = data.samples[index]
            whole.update(f"{task}\t{sample.where}\t{length}\t{sample.text}\t{sample.answer}\n".encode())
    return {"samples": len(data.samples), "sha256": whole.hexdigest()}
