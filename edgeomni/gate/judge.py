"""The gate's verdict: measured figures against thresholds.toml. What it does not know, it does not pass.

A mandatory figure that was not measured, a figure that no threshold names, and a precision without a limit are misses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from ..arrays import F32
from ..bundle import Component
from ..errors import GateError, UsageError
from ..quantize.schemes import parse
from ..question import Question

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Part = Literal["fidelity", "quality", "words", "device"]
"""fidelity: against torch holding the same weights; quality: against the original; words: against the original on a
test set, where one was given; device: against recorded outputs."""
NOT_JUDGED = "not judged: random weights"
MISSING = "MISSED: was not measured"
UNKNOWN = "MISSED: has no threshold"
_SENSES = {"at_least": "≥", "at_most": "≤"}
_BIT_CLASSES = (32, 16, 8, 4)
_NEED_TRAINING = ("quality", "words")
"""Parts that random weights cannot be judged by: their answers are noise."""


@dataclass(frozen=True)
class GateOptions:
    """`limits` replaces thresholds by name ("llm.top1", "quality.llm.kl"); without `enforce` misses are only told.

    `speech` holds recordings, float32 mono at the front end's rate, in place of the synthetic probe. `questions` are
    answered by the original, and the export is judged along these answers (answers.py).
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    enforce: bool = True
    speech: Sequence[F32] = ()
    questions: Sequence[Question] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.limits) - set(known_names())):
            raise UsageError(f"unknown gate figure(s) {', '.join(unknown)}; known are {', '.join(known_names())}")


@dataclass(frozen=True)
class Graded:
    """What chooses a component's limits: the name of its precision, and the fewest bits that a weight is stored in."""

    precision: str
    bits: float

    @classmethod
    def of(cls, component: Component) -> Graded:
        """Raises UsageError for a scheme that this EdgeOmni does not know."""
        bits = [parse(scheme).bits for scheme in component.scheme.values()]
        return cls(component.precision, min(bits, default=0))

    @property
    def bit_class(self) -> str | None:
        """ "bits32", "bits16", "bits8" or "bits4": the widest class that does not promise more than was stored.

        None below 4 bits, for which no limits are known.
        """
        return next((f"bits{n}" for n in _BIT_CLASSES if self.bits >= n), None)


@dataclass(frozen=True)
class Figure:
    """One measured value with its limit and whether it counts. `fault` says why a figure fails whatever its value."""

    name: str
    part: Part
    value: float
    sense: str = ""
    limit: float | None = None
    judged: bool = True
    fault: str = ""

    @property
    def passed(self) -> bool:
        """False for a fault, for a missing limit, and for NaN, which satisfies no limit."""
        if not self.judged:
            return True
        if self.fault or self.limit is None:
            return False
        return self.value >= self.limit if self.sense == "at_least" else self.value <= self.limit

    @property
    def verdict(self) -> str:
        if not self.judged:
            return NOT_JUDGED
        return self.fault or (UNKNOWN if self.limit is None else "pass" if self.passed else "MISSED")

    def __str__(self) -> str:
        if self.fault or self.limit is None:
            return f"{self.part} {self.name} {self.verdict.removeprefix('MISSED: ')}"
        return f"{self.part} {self.name} is {self.value:.6g}, wanted {_SENSES[self.sense]} {self.limit:g}"


@dataclass(frozen=True)
class Report:
    figures: tuple[Figure, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    """What stands behind the figures: per head, per window, names of altered tensors."""

    @property
    def missed(self) -> list[Figure]:
        return [f for f in self.figures if not f.passed]

    def to_dict(self) -> dict[str, Any]:
        """For bundle.json; infinite values and NaN as text, which JSON has no numbers for."""
        parts: dict[str, Any] = {"passed": not self.missed, "details": dict(self.details)}
        for f in self.figures:
            entry = {"value": _plain(f.value), f.sense or "limit": f.limit, "verdict": f.verdict}
            parts.setdefault(f.part, {})[f.name] = entry
        return parts

    def enforce(self, what: str = "the export", remedy: str = "") -> None:
        """Raises GateError that names every missed figure, and the altered tensors if there are any."""
        if not self.missed:
            return
        lines = [str(f) for f in self.missed]
        if altered := self.details.get("altered"):
            lines.append(f"altered tensors: {', '.join(altered[:8])}{' …' if len(altered) > 8 else ''}")
        remedy = remedy or ("Nothing was kept; choose a higher precision, or loosen a threshold with --gate NAME=VALUE")
        raise GateError(f"{what} missed its gate: {'; '.join(lines)}. {remedy}")


def judge(
    measured: Mapping[Part, Mapping[str, float]],
    graded: Mapping[str, Graded],
    *,
    trained: bool,
    options: GateOptions | None = None,
    details: Mapping[str, Any] | None = None,
    within_reach: Mapping[str, float] | None = None,
    expected: Collection[str] = (),
    parts: Sequence[Part] = ("fidelity", "quality"),
    complete: bool = True,
) -> Report:
    """Figures by part and name -> Report. `graded`: component, or task -> what chooses its thresholds.

    `expected` are figures beyond the mandatory ones that must be there ("llm.excess" where kernels round inputs).
    `within_reach` lowers an at-least threshold of fidelity to what float32 can reach on this checkpoint at all.
    `parts` are those that must be there whole. Without `complete` (measuring stopped after a miss) nothing is missed
    for not being there, so such a report tells only of what it holds.
    """
    limits, reach = (options or GateOptions()).limits, within_reach or {}
    figures = []
    for part in dict.fromkeys([*parts, *measured]):
        values = measured.get(part, {})
        missing = _missing(part, values, expected) if complete else ()
        for name in [*values, *missing]:
            sense, limit = _limit(part, name, graded)
            if part not in _NEED_TRAINING and limit is not None and sense == "at_least":
                limit = min(limit, reach.get(name, limit))
            limit = limits.get(_spelling(part, name), limit)
            fault = "" if name in values else MISSING
            value = float(values.get(name, math.nan))
            figures.append(Figure(name, part, value, sense, limit, trained or part not in _NEED_TRAINING, fault))
    return Report(tuple(figures), details or {})


def parse_limit(text: str) -> tuple[str, float]:
    """'llm.top1=0.99' -> ('llm.top1', 0.99). Raises UsageError."""
    name, _, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        raise UsageError(f"--gate {text!r}: expected NAME=NUMBER, for instance llm.top1=0.99") from None
    if math.isnan(limit):
        raise UsageError(f"--gate {text!r}: the threshold must be a number")
    return name.strip(), limit


def known_names() -> list[str]:
    """Every figure that has a threshold, as --gate spells it."""
    return [_spelling(part, name) for part, figures in _thresholds().items() for name in figures]


def meanings() -> dict[str, str]:
    """Every figure, as --gate spells it, with one sentence that says what it is."""
    return {
        _spelling(part, name): entry["meaning"]
        for part, figures in _thresholds().items()
        for name, entry in figures.items()
    }


def _missing(part: Part, values: Mapping[str, float], expected: Collection[str]) -> Iterator[str]:
    """Figures of that part that must be there and are not."""
    for name, entry in _thresholds().get(part, {}).items():
        if name not in values and (entry.get("mandatory", True) or (part == "fidelity" and name in expected)):
            yield name


def _spelling(part: str, name: str) -> str:
    return name if part == "fidelity" else f"{part}.{name}"


def _limit(part: str, name: str, graded: Mapping[str, Graded]) -> tuple[str, float | None]:
    """Sense and limit of a figure; a limit for the precision's own name goes before the one for its bits."""
    entry = _thresholds().get(part, {}).get(name, {})
    grade = graded.get(name.partition(".")[0])
    for sense in _SENSES:
        if sense in entry and grade is not None:
            table = entry[sense]
            return sense, table.get(grade.precision, table.get(grade.bit_class))
    return "", None


@lru_cache
def _thresholds() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads((files(__package__) / "thresholds.toml").read_text(encoding="utf-8"))


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
