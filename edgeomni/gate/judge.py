"""The gate: measured figures against thresholds.toml, and what becomes of an export that misses one."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from ..arrays import F32
from ..errors import GateError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Part = Literal["fidelity", "quality"]
NOT_JUDGED = "not judged: random weights"
_SENSES = {"at_least": "≥", "at_most": "≤"}


@dataclass(frozen=True)
class GateOptions:
    """`limits` replaces thresholds by name ("llm.top1", "quality.llm.kl"); without `enforce` misses are only told.

    `speech` holds recordings, float32 mono at the front end's rate, in place of the synthetic probe.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    enforce: bool = True
    speech: Sequence[F32] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.limits) - set(known_names())):
            raise UsageError(f"unknown gate figure(s) {', '.join(unknown)}; known are {', '.join(known_names())}")


@dataclass(frozen=True)
class Figure:
    """One measured value with its limit (None: recorded only) and whether it counts."""

    name: str
    part: Part
    value: float
    sense: str = ""
    limit: float | None = None
    judged: bool = True

    @property
    def passed(self) -> bool:
        """False also for NaN, which satisfies no limit."""
        if self.limit is None or not self.judged:
            return True
        return self.value >= self.limit if self.sense == "at_least" else self.value <= self.limit

    @property
    def verdict(self) -> str:
        if not self.judged:
            return NOT_JUDGED
        return "recorded" if self.limit is None else ("pass" if self.passed else "MISSED")


@dataclass(frozen=True)
class Report:
    figures: tuple[Figure, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    """What stands behind the figures: per head, per window, names of altered tensors."""

    @property
    def missed(self) -> list[Figure]:
        return [f for f in self.figures if not f.passed]

    def to_dict(self) -> dict[str, Any]:
        """For bundle.json; infinite values as text, which JSON has no number for."""
        parts: dict[str, Any] = {"passed": not self.missed, "details": dict(self.details)}
        for f in self.figures:
            entry = {"value": _plain(f.value), f.sense or "limit": f.limit, "verdict": f.verdict}
            parts.setdefault(f.part, {})[f.name] = entry
        return parts

    def enforce(self) -> None:
        """Raises GateError that names every missed figure, and the altered tensors if there are any."""
        if not self.missed:
            return
        lines = [f"{f.part} {f.name} is {f.value:.6g}, wanted {_SENSES[f.sense]} {f.limit:g}" for f in self.missed]
        if altered := self.details.get("altered"):
            lines.append(f"altered tensors: {', '.join(altered[:8])}{' …' if len(altered) > 8 else ''}")
        raise GateError(
            f"the export missed its gate: {'; '.join(lines)}. Nothing was kept; choose a higher precision, "
            "or loosen a threshold with --gate NAME=VALUE"
        )


def judge(
    measured: Mapping[Part, Mapping[str, float]],
    precisions: Mapping[str, str],
    *,
    trained: bool,
    options: GateOptions,
    details: Mapping[str, Any],
    within_reach: Mapping[str, float] | None = None,
) -> Report:
    """Figures by part and name -> Report. `precisions`: component -> precision, which chooses the thresholds.

    `within_reach` lowers an at-least threshold of fidelity to what float32 can reach on this checkpoint at all.
    """
    figures = []
    for part, values in measured.items():
        for name, value in values.items():
            sense, limit = _limit(part, name, precisions[name.partition(".")[0]])
            if part == "fidelity" and limit is not None:
                limit = min(limit, (within_reach or {}).get(name, limit))
            limit = options.limits.get(_spelling(part, name), limit)
            figures.append(Figure(name, part, float(value), sense, limit, trained or part == "fidelity"))
    return Report(tuple(figures), details)


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


def _spelling(part: str, name: str) -> str:
    return name if part == "fidelity" else f"{part}.{name}"


def _limit(part: str, name: str, precision: str) -> tuple[str, float | None]:
    entry = _thresholds()[part].get(name, {})
    for sense, limits in entry.items():
        return sense, limits.get(precision)
    return "", None


@lru_cache
def _thresholds() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return tomllib.loads((files(__package__) / "thresholds.toml").read_text(encoding="utf-8"))


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
