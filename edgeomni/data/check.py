"""What is in the data, and what is wrong with it: every sound decoded once, every finding with its file and line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ..arrays import F64
from ..errors import DataError
from ..spec import FrontEndSpec
from .check_sound import Heard, listen
from .check_text import CHARS_PER_S, spoken_length
from .sample import Sample

Kind = Literal["line", "fields", "unreadable", "silent", "too-long", "text", "duplicate", "low-rate", "clipped"]
MEANING: dict[Kind, str] = {
    "line": "could not be read as a sample",
    "fields": "lacks what its task needs",
    "unreadable": "has a sound that cannot be read",
    "silent": "has a sound in which nothing is heard",
    "too-long": "lasts longer than the encoder's window",
    "text": "has more text than its sound has time for",
    "duplicate": "is the same as an earlier one",
    "low-rate": "was recorded at a low sample rate",
    "clipped": "was recorded too loud and is cut off",
}
WARNINGS: frozenset[Kind] = frozenset({"low-rate", "clipped"})
"""Kinds of findings with which a sample can still be used."""
LOW_RATE_HZ = FrontEndSpec().sample_rate
WINDOW_S = float(FrontEndSpec().window_s)
UNSTATED = "not stated"
_BATCH = 64

Progress = Callable[[int, int], None]
"""Is told how many samples of how many are done."""


class Faulty(Protocol):
    """A line that a reader could not make a sample of."""

    @property
    def where(self) -> str: ...
    @property
    def what(self) -> str: ...


class Data(Protocol):
    """What readers.DataSet has."""

    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def faults(self) -> Sequence[Faulty]: ...


@dataclass(frozen=True)
class Finding:
    """`index`: of the sample, None for a line that is none. `where`: its file and line."""

    where: str
    kind: Kind
    what: str
    index: int | None = None

    @property
    def unusable(self) -> bool:
        return self.kind not in WARNINGS


@dataclass(frozen=True)
class Limits:
    """`window_s`: seconds of a question that the encoder hears at once. `chars_per_s`: see check_text."""

    window_s: float = WINDOW_S
    chars_per_s: float = CHARS_PER_S
    low_rate_hz: int = LOW_RATE_HZ


@dataclass(frozen=True, eq=False)
class CheckReport:
    """`question_s` and `answer_s`: seconds of each sample's sounds, float64 [samples], 0 where there is none.

    `rates`: sample rate in Hz -> number of recordings.
    """

    samples: Sequence[Sample]
    findings: tuple[Finding, ...]
    question_s: F64
    answer_s: F64
    rates: dict[int, int]
    limits: Limits

    def unusable(self, strict: bool = False) -> dict[int, list[Finding]]:
        """Index of each sample that cannot be used -> why. `strict`: what is only a warning counts as well."""
        why: dict[int, list[Finding]] = {}
        for finding in self.findings:
            if finding.index is not None and (strict or finding.unusable):
                why.setdefault(finding.index, []).append(finding)
        return why

    def passed(self, strict: bool = False) -> bool:
        """Whether nothing was found that makes a sample unusable; with `strict`, whether nothing was found at all."""
        return not any(strict or finding.unusable for finding in self.findings)

    def counts(self) -> dict[Kind, int]:
        """Findings of each kind that was found, in the order of MEANING."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in MEANING if found[kind]}

    def shares(self, name: Literal["language", "speaker"]) -> dict[str, tuple[int, float]]:
        """Language or speaker -> samples and hours of sound, most sound first."""
        total: dict[str, tuple[int, float]] = {}
        for sample, seconds in zip(self.samples, self.question_s + self.answer_s, strict=True):
            key = getattr(sample, name) or UNSTATED
            count, hours = total.get(key, (0, 0.0))
            total[key] = count + 1, hours + float(seconds) / 3600
        return dict(sorted(total.items(), key=lambda item: (-item[1][1], -item[1][0], item[0])))

    def tasks(self) -> dict[str, int]:
        """Task -> samples that can teach it. One sample may teach several."""
        return dict(Counter(task for sample in self.samples for task in _tasks(sample)[0]).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the figures, both histograms, and all findings."""
        return {
            "samples": len(self.samples),
            "unusable": len(self.unusable()),
            "question_hours": float(self.question_s.sum()) / 3600,
            "answer_hours": float(self.answer_s.sum()) / 3600,
            "tasks": self.tasks(),
            "languages": _shares_as_dict(self.shares("language")),
            "speakers": _shares_as_dict(self.shares("speaker")),
            "sample_rates": {str(rate): count for rate, count in self.rates.items()},
            "question_seconds": histogram(self.question_s),
            "answer_seconds": histogram(self.answer_s),
            "counts": dict(self.counts()),
            "findings": [
                {"where": f.where, "kind": f.kind, "what": f.what, "unusable": f.unusable} for f in self.findings
            ],
        }


def check(
    data: Data,
    limits: Limits | None = None,
    *,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
) -> CheckReport:
    """Looks at every sample of `data` and decodes each of its sounds once, in `threads` (default: one per core).

    Never raises for what is wrong with a sample: that is a finding. Raises DataError for limits that are no limits.
    """
    limits = limits or Limits()
    if not (limits.window_s > 0 and limits.chars_per_s > 0):
        raise DataError(f"a window of {limits.window_s:g} s and {limits.chars_per_s:g} characters/s must be above 0")
    findings = [Finding(fault.where, "line", fault.what) for fault in data.faults]
    first: dict[tuple[Any, ...], str] = {}
    rates: Counter[int] = Counter()
    seconds = np.zeros((2, len(data.samples)))
    for i, (sample, (questions, answers)) in enumerate(_heard(data.samples, threads, progress)):
        found = [*_fields(sample), *_sounds(sample, questions, answers, limits)]
        if not any(heard.fault for heard in questions + answers):
            found += _repeated(sample, questions + answers, first)
        findings += [Finding(sample.where, kind, what, i) for kind, what in found]
        rates.update(heard.rate for heard in questions + answers if heard.rate)
        seconds[:, i] = sum(heard.seconds for heard in questions), sum(heard.seconds for heard in answers)
    return CheckReport(data.samples, tuple(findings), seconds[0], seconds[1], dict(sorted(rates.items())), limits)


def histogram(seconds: F64, bins: int = 20) -> dict[str, list[float]]:
    """Seconds [n], those above 0 -> "edges_s" and "counts"; both empty where there is nothing to count."""
    some = seconds[seconds > 0]
    if not len(some):
        return {"edges_s": [], "counts": []}
    counts, edges = np.histogram(some, bins, (0, float(some.max())))
    return {"edges_s": edges.tolist(), "counts": counts.tolist()}


_Sounds = tuple[list[Heard], list[Heard]]
"""A sample's sounds: those of the question, that of the answer where it has one."""
_Found = tuple[Kind, str]


def _heard(samples: Sequence[Sample], threads: int | None, progress: Progress) -> Iterator[tuple[Sample, _Sounds]]:
    """Decoding leaves Python's lock alone, so threads are enough; batch by batch, so that Ctrl-C ends it soon."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for start in range(0, len(samples), _BATCH):
            batch = [samples[i] for i in range(start, min(start + _BATCH, len(samples)))]
            yield from zip(batch, pool.map(_listened, batch), strict=True)
            progress(start + len(batch), len(samples))


def _listened(sample: Sample) -> _Sounds:
    answer = [] if sample.answer_audio is None else [sample.answer_audio]
    return [listen(clip) for clip in sample.audio], [listen(clip) for clip in answer]


def _tasks(sample: Sample) -> tuple[tuple[str, ...], str]:
    """The sample's tasks, and what is wrong with the one that it states."""
    try:
        return sample.tasks(), ""
    except DataError as exc:
        return (), str(exc).removeprefix(f"{sample.where}: ")


def _fields(sample: Sample) -> Iterator[_Found]:
    tasks, fault = _tasks(sample)
    if fault:
        yield "fields", fault
    elif not tasks:
        yield "fields", "is enough for no task: it needs a question and an answer, or a sound and what is said in it"


def _sounds(sample: Sample, questions: list[Heard], answers: list[Heard], limits: Limits) -> Iterator[_Found]:
    for heard in questions + answers:
        if heard.fault:
            yield "silent" if heard.silent else "unreadable", heard.fault
        if 0 < heard.rate < limits.low_rate_hz:
            yield "low-rate", f"{heard.rate} Hz, less than {limits.low_rate_hz} Hz"
        if heard.clipped_runs:
            yield "clipped", f"the wave is cut off at full scale {heard.clipped_runs} times"
    if (asked := sum(heard.seconds for heard in questions)) > limits.window_s:
        yield "too-long", f"the question lasts {asked:.1f} s, the encoder's window is {limits.window_s:g} s"
    yield from _too_much_text("the text", sample.text, questions, limits)
    yield from _too_much_text("the answer's text", sample.answer, answers, limits)


def _too_much_text(name: str, text: str, sounds: list[Heard], limits: Limits) -> Iterator[_Found]:
    seconds, length = sum(heard.seconds for heard in sounds), spoken_length(text)
    if sounds and not any(heard.fault for heard in sounds) and length > limits.chars_per_s * seconds:
        yield (
            "text",
            f"{name} has {length} letters to say in {seconds:.2f} s, {length / seconds:.0f} per second; "
            f"at most {limits.chars_per_s:g} are believed",
        )


def _repeated(sample: Sample, sounds: list[Heard], first: dict[tuple[Any, ...], str]) -> Iterator[_Found]:
    codes = None if sample.answer_codes is None else sample.answer_codes.tobytes()
    words = sample.text.split(), sample.answer.split(), sample.history
    key = (sample.task, sample.system, str(words), codes, *(heard.digest for heard in sounds))
    if key in first:
        yield "duplicate", f"the same {'sounds and text' if sounds else 'text'} as {first[key]}"
    first.setdefault(key, sample.where)


def _shares_as_dict(shares: dict[str, tuple[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {"samples": count, "hours": hours} for name, (count, hours) in shares.items()}
