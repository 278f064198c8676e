"""Measures turns of a Session: `measure` here, `measure_apart` in a fresh process, so that its memory is its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .. import __version__, measured
from ..apart import module_command
from ..bundle import Bundle, is_bundle
from ..engines import ENGINES, Device, EngineChoice
from ..errors import EdgeOmniError, GateError, UsageError
from ..hardware import check_threads, detect
from ..outputs import write_file
from ..overlap import OverlapChoice
from ..runtimes import versions_of
from ..sampling import Sampling
from ..session import Session, TurnEnd
from ..shipped import to_run
from ..spec import AUDIO_IN, AUDIO_OUT, OmniSpec, Task
from .meters import MB, peak_rss_mb, percentiles
from .question import spoken_question

RANDOM_FRAMES = 117
"""Codec frames forced on a model with random weights, whose own answers end anywhere: 10 s of SNAC 24 kHz."""
SECONDS = (0.1, 600.0)
"""Lengths of a synthesized question that can be asked for. An encoder's window is 30 s."""
MOST = 100_000
"""Turns, warm-up turns and forced frames that can be asked for: more would never end."""
SPANS_SHOWN_AS = {"load": "sound file"}
"""Session's span "load" is the question's; loading the model is `load_s`."""
STAGES = (
    "sound file",
    "mel",
    "encoder",
    "prefill",
    "frame",
    "frame.body",
    "frame.text_head",
    "frame.sampling",
    "frame.audio_head",
    "codec",
    "codec.wait",
)
TURN_FIGURES = ("ttft", "ttfa", "prefill", "total", "audio", "rtf", "rtf_turn", "frames", "frames_per_s")
_log = logging.getLogger("edgeomni")
_told: set[str] = set()
"""What measuring processes warned of, each told once by this one."""


@dataclass(frozen=True)
class Job:
    """What to measure. Without `audio` a question of `seconds` is synthesized; greedy, so that turns are alike.

    `forced_frames`: codec frames that the answer is made to have (0: the model's own; None: the model's own when it
    is trained, else 117). `forced_text_end`: LLM frame at which text ends (None: a third of the forced frames).
    Raises UsageError for lengths and counts out of range.
    """

    source: str
    task: Task = "aa"
    audio: str | None = None
    text: str | None = None
    seconds: float = 5.0
    turns: int = 3
    warmup: int = 1
    forced_frames: int | None = None
    forced_text_end: int | None = None
    threads: int | None = None
    device: Device | None = None
    engine: EngineChoice = None
    overlap: OverlapChoice = "auto"
    strict: bool = False
    encoder_window: float | str | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)
        shortest, longest = SECONDS
        if isinstance(self.seconds, bool) or not shortest <= self.seconds <= longest:
            raise UsageError(f"seconds must lie between {shortest:g} and {longest:g}, not {self.seconds!r}")
        least = {"turns": 1, "warmup": 0, "forced_frames": 0, "forced_text_end": 1}
        for name, low in least.items():
            count = getattr(self, name)
            optional = name.startswith("forced")
            if not (optional and count is None) and (type(count) is not int or not low <= count <= MOST):
                raise UsageError(f"{name} must be a whole number from {low} to {MOST}, not {count!r}")


def measure_apart(job: Job) -> dict[str, Any]:
    """`measure` in a child process, whose warnings are told here. Raises what the child met, as that kind of error."""
    command = module_command("edgeomni.profiling.measure")
    child = subprocess.run(
        command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False, env=_environment()
    )
    if not child.stdout.strip():
        raise EdgeOmniError(f"the measuring process ended with {child.returncode}: {child.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    for text in report.pop("warnings", ()):
        if text not in _told:
            _told.add(text)
            _log.warning("%s", text)
    if "error" in report:
        kinds: dict[int, type[EdgeOmniError]] = {2: UsageError, 3: GateError}
        raise kinds.get(report["exit_code"], EdgeOmniError)(report["error"])
    return report


def _environment() -> dict[str, str]:
    """The parent's, with the folder that this edgeomni was imported from, which need not be an installed one."""
    here = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}


def measure(job: Job) -> dict[str, Any]:
    """Loads, warms up, answers `turns` times. Times in seconds, stages in ms, memory and files in 10^6 bytes.

    Raises what Session raises.
    """
    began = perf_counter()
    source = to_run(job.source, job.engine if isinstance(job.engine, str) else None)
    bundle = Bundle.open(source) if is_bundle(source) else None
    how: dict[str, Any] = {name: getattr(job, name) for name in ("threads", "device", "engine", "overlap", "strict")}
    session = Session.open(bundle or source, **how)
    load_s = perf_counter() - began
    arguments = _arguments(job, session.spec, bundle)
    ends = [_turn(session, job.task, arguments) for _ in range(job.warmup + job.turns)][job.warmup :]
    machine = detect()
    report = {
        "edgeomni": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": machine.label,
        "machine": machine.to_dict(),
        "job": asdict(job),
        "bundle": _bundle_facts(job.source, bundle),
        "forced_frames": _forced(arguments),
        "engines": session.ways,
        "overlap": session.overlap,
        "load_s": load_s,
        "turn": _medians(ends),
        "stages": _stages(ends),
        "peak_rss_mb": peak_rss_mb(),
    }
    if bundle is not None and session.ways:
        _remember(report, job, bundle)
    return report


def _remember(report: dict[str, Any], job: Job, bundle: Bundle) -> None:
    """Keeps what `--engine auto` chooses by, and what a step down is priced by."""
    names = dict.fromkeys(way.split(" on ")[0] for way in report["engines"].values())
    asked = ("task", "audio", "text", "seconds", "forced_frames", "forced_text_end", "overlap", "encoder_window")
    kept = measured.remember(
        measured.Run(
            bundle=bundle.digest,
            machine=measured.this_machine(),
            threads=job.threads,
            question={name: getattr(job, name) for name in asked},
            ways=report["engines"],
            versions=versions_of(ENGINES[name] for name in names),
            date=report["date"],
            stages={name: row["p50_ms"] for name, row in report["stages"].items()},
            ttfa=report["turn"].get("ttfa"),
            rtf=report["turn"].get("rtf"),
        )
    )
    if kept is None:
        _log.warning(
            "what was measured cannot be kept in %s, so that --engine auto does not choose by it; make that folder "
            "writable, or name another one by XDG_CACHE_HOME",
            measured.folder(),
        )


def budget_figures(report: dict[str, Any]) -> dict[str, float | None]:
    """The figures that a hardware profile's budgets bound."""
    return {
        "ttfa_s": report["turn"].get("ttfa"),
        "rtf": report["turn"].get("rtf"),
        "peak_rss_mb": report["peak_rss_mb"],
        "bundle_mb": report["bundle"].get("mb"),
    }


def save(report: dict[str, Any], folder: Path = Path("profiles/results")) -> Path:
    """Writes <folder>/<device>-<bundle>-<date>.json; a later run of the same day replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['device']}-{report['bundle']['name']}-{report['date'][:10]}.json"
    write_file(path, (json.dumps(report, indent=1, sort_keys=True) + "\n").encode(), force=True)
    return path


def _arguments(job: Job, spec: OmniSpec, bundle: Bundle | None) -> dict[str, Any]:
    """Arguments of Session.respond for every turn of the job."""
    arguments: dict[str, Any] = {"sampling": Sampling(greedy=True), "encoder_window": job.encoder_window}
    if job.task in AUDIO_IN:
        arguments["audio"] = job.audio or spoken_question(job.seconds, spec.front_end.sample_rate)
    else:
        arguments["text"] = job.text
    random = bundle is not None and bundle.manifest.provenance.get("weights") == "random"
    frames = (RANDOM_FRAMES if random else 0) if job.forced_frames is None else job.forced_frames
    if frames and job.task in AUDIO_OUT:
        shape = (frames, spec.codec.streams)
        arguments["forced_codes"] = np.random.default_rng(0).integers(0, spec.codec.codebook_size, shape)
        arguments["forced_text_end"] = max(1, frames // 3) if job.forced_text_end is None else job.forced_text_end
    return arguments


def _forced(arguments: dict[str, Any]) -> int:
    return len(arguments.get("forced_codes", ()))


def _turn(session: Session, task: Task, arguments: dict[str, Any]) -> TurnEnd:
    *_, end = session.respond(task, **arguments)
    assert isinstance(end, TurnEnd)
    return end


def _medians(ends: list[TurnEnd]) -> dict[str, float]:
    """Median over turns of each figure that every turn has."""
    return {
        name: float(np.median([end.timings[name] for end in ends]))
        for name in TURN_FIGURES
        if all(name in end.timings for end in ends)
    }


def _stages(ends: list[TurnEnd]) -> dict[str, dict[str, float]]:
    records: dict[str, list[float]] = defaultdict(list)
    for end in ends:
        for name, seconds in end.spans.records.items():
            records[SPANS_SHOWN_AS.get(name, name)] += seconds
    order = [*STAGES, *sorted(set(records) - set(STAGES))]
    return {name: percentiles(records[name]) for name in order if records.get(name)}


def _bundle_facts(source: str, bundle: Bundle | None) -> dict[str, Any]:
    name = Path(source).resolve().name
    if bundle is None:
        return {"name": name, "kind": "checkpoint"}
    parts = {k: f"{c.engine} {c.format}:{c.precision}" for k, c in bundle.manifest.components.items()}
    weights = bundle.manifest.provenance.get("weights")
    return {"name": name, "kind": "bundle", "mb": bundle.size / MB, "components": parts, "weights": weights}


class _Warnings(logging.Handler):
    """Keeps what is warned of, for the parent to tell: steps down among it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _main() -> None:
    """The child process: a Job on stdin, the report or the error as one JSON line on stdout, with the warnings."""
    warnings = _Warnings()
    _log.addHandler(warnings)
    try:
        report = measure(Job(**json.loads(sys.stdin.read())))
    except EdgeOmniError as exc:
        report = {"error": str(exc), "exit_code": exc.exit_code}
    print(json.dumps({**report, "warnings": warnings.texts}))


if __name__ == "__main__":
    _main()
