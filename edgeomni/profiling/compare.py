"""Which engines answer this bundle fastest here: each set of engines measured in a process of its own, one by one.

The sets are what `--engine auto` would take without any profile, each engine that can run everything alone, and last
the mixture of what was fastest for each component. What was measured is remembered (edgeomni/measured.py), and from
then on `--engine auto` takes the fastest set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from .. import runtimes
from ..bundle import Bundle, is_bundle
from ..engines import AUTO, COMPONENTS, ENGINES
from ..errors import EdgeOmniError, UsageError
from ..measured import STAGE
from ..runtimes.choice import ways_of
from ..shipped import to_run
from .measure import Job, measure_apart

COLUMNS = {"encoder": "encoder ms", "prefill": "prefill ms", "frame": "frame ms", "codec": "codec ms"}
"""Stage -> its heading; the medians are shown."""
Report = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """`reports`: one per set that could be measured; `failed`: set in words -> why not; `auto`: what is taken now."""

    reports: list[Report]
    failed: dict[str, str]
    auto: dict[str, str]

    @property
    def picked(self) -> Report:
        """The report of the set that `--engine auto` takes."""
        return next((r for r in self.reports if r["engines"] == self.auto), self.reports[0])

    def to_dict(self) -> dict[str, Any]:
        others = [{k: r[k] for k in ("engines", "turn", "stages", "peak_rss_mb", "load_s")} for r in self.reports]
        return {**self.picked, "compared": others, "failed": self.failed, "auto": self.auto}


def compare(
    job: Job, progress: Callable[[str], None] = lambda _: None, measure: Callable[[Job], Report] = measure_apart
) -> Comparison:
    """Measures every set that the bundle of `job` offers here.

    Raises UsageError where `job` names an engine or no bundle, and what the last set raised where none could be
    measured.
    """
    source = to_run(job.source, None)
    if job.engine not in (None, AUTO) or not is_bundle(source):
        raise UsageError("--compare measures every engine of a bundle: give a bundle, and leave --engine out")
    reports, failed, errors = list[Report](), dict[str, str](), list[EdgeOmniError]()

    def add(candidate: Job) -> None:
        name = _words(candidate)
        progress(name)
        try:
            report = measure(candidate)
        except EdgeOmniError as exc:
            failed[name] = str(exc)
            errors.append(exc)
            return
        if all(report["engines"] != r["engines"] for r in reports):
            reports.append(report)

    bundle = Bundle.open(source)
    for candidate in _alone(bundle, job):
        add(candidate)
    mixed = _mixture(reports)
    if mixed and any(r["engines"] == mixed for r in reports) is False and (candidate := _job_of(job, mixed)):
        add(candidate)
    if not reports:
        raise errors[-1]
    first = runtimes.chosen(bundle, None, job.device, job.threads).first
    return Comparison(reports, failed, {name: way.label for name, way in first.items()})


def _alone(bundle: Bundle, job: Job) -> Iterator[Job]:
    """The default set, and every engine and device that run all components."""
    yield replace(job, engine=None)
    devices = {
        name: {(w.engine.name, w.device) for w in ways_of(bundle, name, None, job.device)} for name in COMPONENTS
    }
    everywhere = set.intersection(*devices.values())
    for engine in ENGINES.values():
        for device in engine.devices:
            if (engine.name, device) in everywhere:
                yield replace(job, engine=engine.name, device=device, strict=True)


def _mixture(reports: list[Report]) -> dict[str, str]:
    """Component -> the way that had the least median of its stage; empty where a stage was not measured."""
    mixed = {}
    for name in COMPONENTS:
        timed = [r for r in reports if STAGE[name] in r["stages"]]
        if not timed:
            return {}
        mixed[name] = min(timed, key=lambda r: r["stages"][STAGE[name]]["p50_ms"])["engines"][name]
    return mixed


def _job_of(job: Job, ways: dict[str, str]) -> Job | None:
    """The job that runs components in these ways; None where they are on several devices, which no option can say."""
    parts = {name: way.split(" (")[0].split(" on ") for name, way in ways.items()}
    if len({device for _, device in parts.values()}) > 1:
        return None
    engines = {name: engine for name, (engine, _) in parts.items()}
    return replace(job, engine=engines, device=next(iter(parts.values()))[1], strict=True)  # type: ignore[arg-type]


def _words(job: Job) -> str:
    if job.engine is None:
        return AUTO
    named = job.engine if isinstance(job.engine, str) else ", ".join(f"{k} {v}" for k, v in job.engine.items())
    return f"{named} on {job.device}"


def tables(comparison: Comparison) -> Iterator[str | Table]:
    """The sets side by side, the one that `--engine auto` takes marked, and what could not be measured."""
    table = Table("", "engines")
    for heading in ("first audio s", "RTF", *COLUMNS.values(), "peak MB"):
        table.add_column(heading, justify="right")
    for report in comparison.reports:
        turn, stages = report["turn"], report["stages"]
        cells = [_number(turn.get("ttfa"), 3), _number(turn.get("rtf"), 3)]
        cells += [_number(stages.get(stage, {}).get("p50_ms"), 1) for stage in COLUMNS]
        mark = "auto" if report["engines"] == comparison.auto else ""
        table.add_row(mark, _engines(report["engines"]), *cells, _number(report["peak_rss_mb"], 0))
    yield table
    for name, reason in comparison.failed.items():
        yield f"{name} could not be measured: {reason}"
    yield f"--engine auto takes: {_engines(comparison.auto)}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _engines(ways: dict[str, str]) -> str:
    """Ways of all components in words, once where they are the same but for the precision."""
    places = {name: way.split(" (")[0] for name, way in ways.items()}
    if len(set(places.values())) == 1:
        return next(iter(places.values()))
    return ", ".join(f"{name} {place}" for name, place in places.items())
