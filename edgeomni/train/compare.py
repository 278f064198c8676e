"""Training runs side by side: what differs in their configurations, and what came of it. Needs no torch.

Of each run RUN/config.toml and RUN/log.jsonl are read, RUN/evaluation.json (the text ability before and after) where
there is one, and every RUN/evaluation-NAME.json, which `edgeomni evaluate ... --json > RUN/evaluation-NAME.json` makes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import TrainError, UsageError
from ..evaluate.report import WORDS
from ..schema import Source, parse_json, parse_toml, read_bytes, short
from .run import RunFolder
from .run_log import SECONDS, read

_REMEDY = "it is not what a training run writes; restore it"
Figure = int | float | None


@dataclass(frozen=True)
class Run:
    """One run: its configuration by key path, its log, and by name its figures (losses in nats per label, None where
    they were not logged) and what evaluations found (shares of 1, word errors too)."""

    name: str
    config: dict[str, Any]
    log: list[dict[str, Any]]
    figures: dict[str, Figure]
    shares: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """`differs`: key path -> the value in each run (None: not set there), of all keys that are not the same in all."""

    runs: list[Run]
    differs: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "runs": [{"run": run.name, **run.figures, "evaluated": run.shares} for run in self.runs],
            "differs": self.differs,
        }


def compare(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Two or more runs by their folders. Raises UsageError for what is no run, TrainError for a damaged one."""
    names = [os.fspath(path) for path in paths]
    if len(set(names)) < max(2, len(names)):
        raise UsageError("give two or more different runs to compare")
    runs = [load(name) for name in names]
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return Comparison(runs, {key: row for key, row in values.items() if any(value != row[0] for value in row)})


def load(name: str) -> Run:
    """Raises UsageError for a folder that is no run, TrainError for one whose files are damaged."""
    folder = RunFolder(Path(name))
    if absent := [path.name for path in (folder.config, folder.log) if not path.is_file()]:
        raise UsageError(f"{name} is no training run (it has no {' and no '.join(absent)}); give what `train -o` wrote")
    source = Source(str(folder.config), TrainError, _REMEDY)
    config = dict(_flat(parse_toml(read_bytes(folder.config, source), source)))
    log = read(folder.log)
    return Run(name, config, log, _learning(log), dict(_evaluated(folder)))


def _learning(log: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Steps, losses, speed and time of a log. A line beyond which a run was resumed begins a new count of seconds."""
    spent = [line.get(SECONDS, 0.0) for line in log]
    resumed = [before for before, after in pairwise(spent) if after < before]
    return {
        "steps": max((line["step"] for line in log), default=0),
        **dict(_losses(log, "loss", "training loss")),
        **dict(_losses(log, "eval_loss", "validation loss")),
        "tokens per second": _speed(log),
        "seconds": round(sum(resumed) + (spent[-1] if spent else 0.0), 3),
    }


def _losses(log: Sequence[Mapping[str, Any]], key: str, name: str) -> Iterator[tuple[str, Figure]]:
    known = [(line[key], line["step"]) for line in log if line.get(key) is not None]
    best = min(known, default=(None, None))
    yield from ((f"{name}, last", known[-1][0] if known else None), (f"{name}, best", best[0]))
    yield f"{name}, best at step", best[1]


def _speed(log: Sequence[Mapping[str, Any]]) -> Figure:
    """LLM frames per second between the lines of a log, validation left out: no frame is trained on meanwhile."""
    frames = seconds = 0.0
    for before, after in pairwise(line for line in log if "frames" in line and SECONDS in line):
        if after["frames"] > before["frames"] and after[SECONDS] > before[SECONDS]:
            frames += after["frames"] - before["frames"]
            seconds += after[SECONDS] - before[SECONDS]
    return round(frames / seconds, 1) if seconds else None


def _evaluated(folder: RunFolder) -> Iterator[tuple[str, float]]:
    """The shares of all evaluations of a run, by a name that says where they are from."""
    if folder.evaluation.is_file():
        found = _Document(folder.evaluation)
        for name, words in WORDS.items():
            for when in ("before", "after"):
                if name in (told := found.inside(when)):
                    yield f"text {when}: {words}", found.share(told[name], f"{when}.{name}")
    for path in sorted(folder.path.glob("evaluation-*.json")):
        found, named = _Document(path, source=True), path.stem.removeprefix("evaluation-")
        for task in found.inside("tasks"):
            for name, metric in found.inside("tasks", task, "metrics").items():
                value = metric.get("value") if isinstance(metric, dict) else None
                yield f"{named}, {task}: {WORDS.get(name, name)}", found.share(value, f"{task}.metrics.{name}")


class _Document:
    """A JSON document of evaluations. `source`: it is what `edgeomni evaluate` prints, of a single source."""

    def __init__(self, path: Path, source: bool = False) -> None:
        self._source = Source(str(path), TrainError, _REMEDY)
        self._data: Any = parse_json(read_bytes(path, self._source), self._source)
        if source:
            sources = self._data.get("sources")
            if not isinstance(sources, list) or len(sources) != 1:
                raise self._source.fault("must be what `edgeomni evaluate --json` prints of one source", "$.sources")
            self._data = sources[0]

    def inside(self, *keys: str) -> dict[str, Any]:
        """The object below the keys, empty where there is none."""
        found = self._data
        for key in keys:
            found = found.get(key, {}) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise self._source.fault("must be an object", ".".join(keys))
        return found

    def share(self, value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._source.fault(f"must be a number, not {short(value)}", path)
        return float(value)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key paths and values of a document's tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
