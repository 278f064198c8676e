"""The demo's table: the same model in fp32, INT8 and INT4, in words right, megabytes and milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..bundle import Bundle
from ..data.sample import Sample
from ..errors import EngineError
from ..evaluate import Evaluation, evaluate
from ..evaluate.metrics import check_jiwer
from ..evaluate.recognisers import POCKETSPHINX, Hearings
from ..evaluate.run import Asking
from ..install_hint import install_command
from ..profiling.measure import Job, measure_apart
from ..spec import Task
from .answer import MAX_SECONDS, longest

EXPORTED = ("fp32", "int8")
SHIPPED = "int4"
NAMES = {"fp32": "fp32", "int8": "INT8", "int4": "INT4"}
TURNS = 3
COLUMNS: Mapping[str, tuple[str, str]] = {
    "wer": ("WER %", ".1f"),
    "exact": ("text %", ".1f"),
    "heard": ("heard %", ".1f"),
    "ceiling": ("ceiling %", ".1f"),
    "floor": ("floor %", ".1f"),
    "mb": ("MB", ".1f"),
    "first_audio_ms": ("first audio ms", ".0f"),
    "rtf": ("RTF", ".3f"),
    "peak_rss_mb": ("memory MB", ".0f"),
}
"""Figure -> its column, and how it is written."""
LEGEND = (
    "WER: word errors in what it hears. Text: answers that are the expected one, word for word. Heard: the same, as "
    "pocketsphinx hears the sound; ceiling: as it hears the original recordings; floor: against the answers of other "
    "questions. MB: files on disk. Memory: the most that a process of its own held."
)
_SPOKEN = {"heard": "heard_exact", "ceiling": "ceiling_exact", "floor": "floor_exact"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Words:
    """What can be measured in words here: test questions, their tasks, and who hears the answers (None: nobody)."""

    samples: Sequence[Sample]
    tasks: Collection[Task]
    hearings: Hearings | None

    def of(self, bundle: Bundle, name: str, threads: int | None) -> Evaluation:
        """Raises what `evaluate` raises."""
        asking = Asking(max_seconds=MAX_SECONDS, max_length=longest(bundle.spec))
        how: dict[str, Any] = {"tasks": self.tasks, "recogniser": self.hearings, "asking": asking, "threads": threads}
        return evaluate(bundle, self.samples, name=NAMES[name], **how)


@dataclass(frozen=True)
class Measured:
    """One precision. `evaluation` None where no words could be measured; `profile` is what `measure` reports."""

    precision: str
    evaluation: Evaluation | None
    profile: Mapping[str, Any]

    def figures(self) -> dict[str, float]:
        """The columns that were measured; shares in hundredths, sizes in 10^6 bytes."""
        turn = self.profile["turn"]
        found = {"mb": self.profile["bundle"]["mb"], "rtf": turn.get("rtf"), "peak_rss_mb": self.profile["peak_rss_mb"]}
        found["first_audio_ms"] = 1000 * turn["ttfa"] if "ttfa" in turn else None
        if self.evaluation:
            heard, said = (self.evaluation.metrics(task) for task in ("asr", "aa"))
            metrics = {"wer": heard.get("wer"), "exact": said.get("exact")}
            metrics |= {name: said.get(metric) for name, metric in _SPOKEN.items()}
            found |= {name: 100 * metric.value for name, metric in metrics.items() if metric}
        return {name: found[name] for name in COLUMNS if found.get(name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Without the places of files, which were temporary."""
        told = ("device", "load_s", "turn", "stages", "peak_rss_mb")
        evaluation = self.evaluation.to_dict() if self.evaluation else None
        return {"figures": self.figures(), "evaluation": evaluation, "profile": {k: self.profile[k] for k in told}}


def words_of(samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Words, list[str]]:
    """What can be measured of `samples`, and what cannot, in sentences. `answers`: all that a recogniser may expect."""
    hearings, lacking = Hearings(POCKETSPHINX, answers), list[str]()
    tasks: list[Task] = ["asr", "aa"]
    try:
        check_jiwer()
    except EngineError as exc:
        return Words(samples, ["aa"], None), [f"no WER and no answers as heard: {exc}"]
    try:
        hearings.check()
    except EngineError as exc:
        lacking.append(f"no answers as heard: {exc}")
    return Words(samples, tasks, None if lacking else hearings), lacking


def exported(checkpoint: Path, folder: Path, threads: int | None, tell: Say) -> tuple[dict[str, Bundle], list[str]]:
    """Precision -> bundle, exported to new folders in `folder` and past the gate; or why there is none.

    Raises what `export_bundle` raises.
    """
    try:
        from ..export import export_bundle
        from ..model import checkpoints

        model = checkpoints.load(checkpoint)
        bundles = {}
        for name in EXPORTED:
            tell(f"export to {NAMES[name]}, which the gate compares with the checkpoint ...")
            bundles[name] = export_bundle(model, folder / f"bundle-{name}", precision=name, threads=threads)
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("edgeomni"):
            raise
        missing = f"the export to fp32 and INT8 needs {exc.name}, which is not installed"
        return {}, [f"INT4 alone: {missing}: {install_command('export')}"]
    return bundles, []


def measured(name: str, bundle: Bundle, question: Path, words: Words | None, threads: int | None) -> Measured:
    """Words first, then times and memory of answers to `question` in a process of their own.

    Raises what `evaluate` and `measure_apart` raise.
    """
    evaluation = words.of(bundle, name, threads) if words else None
    job = Job(str(bundle.path), audio=str(question), turns=TURNS, threads=threads)
    return Measured(name, evaluation, measure_apart(job))


def table(rows: Sequence[Measured]) -> Table:
    """One row per precision, and the columns of which any row has a figure."""
    counts = {len(row.evaluation.of("aa")) for row in rows if row.evaluation}
    title = f"nano, {max(counts)} questions with voices and wordings that training never had" if counts else "nano"
    out, figures = Table("precision", title=title), [row.figures() for row in rows]
    columns = [name for name in COLUMNS if any(name in found for found in figures)]
    for name in columns:
        out.add_column(COLUMNS[name][0], justify="right")
    for row, found in zip(rows, figures, strict=True):
        cells = (format(found[name], COLUMNS[name][1]) if name in found else "-" for name in columns)
        out.add_row(NAMES[row.precision], *cells)
    return out
