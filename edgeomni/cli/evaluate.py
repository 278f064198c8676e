"""`edgeomni evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..outputs import check_file, first_few, new_file
from ..printing import say, show
from ..spec import TASKS
from .common import console, engine_options, force_option, options, overlap_option
from .terminal import visible

if TYPE_CHECKING:
    from ..data.readers import DataSet
    from ..evaluate.comparison import Comparison
    from ..evaluate.result import Evaluation, Unusable
    from ..evaluate.run import Progress

recogniser_option = click.option(
    "--recogniser",
    metavar="NAME|COMMAND",
    help="Hears spoken answers: pocketsphinx, or a command that prints the transcript of {wav}.",
)
data_options = options(
    click.option("--data", "source_data", required=True, metavar="DATA", help="Test set, of any format that is read."),
    click.option("--format", "format_", metavar="F", help="Its format [default: told by what it is]."),
    click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Repeatable [default: all it has]."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N samples of each task."),
    click.option(
        "--max-bad", type=click.IntRange(0), default=10, show_default=True, help="Samples that may be unusable."
    ),
)
hearing_options = options(
    recogniser_option,
    click.option(
        "--recogniser-timeout",
        type=click.FloatRange(0, min_open=True),
        default=120.0,
        show_default=True,
        metavar="SECONDS",
        help="For one answer, of a command.",
    ),
)
answer_options = options(
    click.option(
        "--max-seconds",
        type=click.FloatRange(0, min_open=True),
        default=30.0,
        show_default=True,
        help="Sound of an answer at most.",
    ),
    click.option("--max-length", type=click.IntRange(1), help="Frames at most, prompt counted in."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the floor and the interval."),
)


@click.command("evaluate")
@click.argument("source")
@click.argument("source2", required=False)
@data_options
@hearing_options
@answer_options
@engine_options
@overlap_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--rows", metavar="FILE", help="Write every sample's answer and scores as JSON Lines.")
@force_option
def evaluate_(source: str, source2: str | None, as_json: bool, rows: str | None, force: bool, **how: Any) -> None:
    """Judge SOURCE (a bundle or a checkpoint) in words on a test set; with SOURCE2, compare both sample by sample.

    \b
    edgeomni evaluate bundle --data test.jsonl --recogniser pocketsphinx
    edgeomni evaluate nano --data test.jsonl --task at
    edgeomni evaluate ckpt bundle --data test.jsonl --task aa --recogniser "transcribe {wav}" --json
    """
    if rows:
        check_file(rows, force)
    from ..evaluate import compare

    evaluations = _evaluated([source, source2] if source2 else [source], how)
    comparison = compare(*evaluations, seed=how["seed"]) if source2 else None
    if rows:
        _write_rows(rows, evaluations, force)
    if as_json:
        click.echo(json.dumps(_as_json(evaluations, comparison), ensure_ascii=False, sort_keys=True))
    else:
        _show(evaluations, comparison)


def unreadable(data: DataSet) -> list[Unusable]:
    """What the reader could not use, as an evaluation tells it."""
    from ..evaluate.result import Unusable

    return [Unusable(fault.where, "", fault.what) for fault in data.faults]


def _evaluated(sources: list[str], how: dict[str, Any]) -> list[Evaluation]:
    """Each source's evaluation; the recogniser hears what is said twice once."""
    from ..data.readers import read_data
    from ..evaluate.recognisers import Hearings
    from ..evaluate.run import Asking, evaluate
    from ..evaluate.selection import sentences

    data = read_data(how["source_data"], how["format_"], max_bad=how["max_bad"])
    heard = how["recogniser"]
    same = {name: how[name] for name in ("limit", "seed", "threads", "device", "engine", "overlap", "strict")}
    same |= {
        "recogniser": Hearings(heard, sentences(data.samples), how["recogniser_timeout"]) if heard else None,
        "tasks": how["tasks"] or None,
        "max_bad": how["max_bad"],
        "unreadable": unreadable(data),
        "asking": Asking(max_seconds=how["max_seconds"], max_length=how["max_length"]),
    }
    evaluations = []
    for source in sources:
        with _progress(source) as progress:
            evaluations.append(evaluate(source, data.samples, progress=progress, **same))
    return evaluations


@contextmanager
def _progress(source: str) -> Iterator[Progress]:
    """A bar with the time left on a terminal; elsewhere a line per tenth of a task. On stderr."""
    title = visible(f"evaluate {source}")
    if not sys.stderr.isatty():
        yield lambda task, done, total: _line(title, task, done, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console(err=True), transient=True) as bar:
        bars: dict[str, Any] = {}

        def progress(task: str, done: int, total: int) -> None:
            if task not in bars:
                bars[task] = bar.add_task(task, total=total)
            bar.update(bars[task], completed=done)

        yield progress


def _line(title: str, task: str, done: int, total: int) -> None:
    if done * 10 // total != (done - 1) * 10 // total:
        click.echo(f"{title}: {task} {done} of {total}", err=True)


def _write_rows(path: str, evaluations: Iterable[Evaluation], force: bool) -> None:
    with new_file(path, force) as part, part.open("w", encoding="utf-8") as out:
        for evaluation in evaluations:
            for row in evaluation.rows:
                line = {"source": evaluation.source, **row.to_dict()}
                out.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")


def _as_json(evaluations: list[Evaluation], comparison: Comparison | None) -> dict[str, Any]:
    out: dict[str, Any] = {"sources": [evaluation.to_dict() for evaluation in evaluations]}
    return {**out, "comparison": comparison.to_dict()} if comparison else out


def _show(evaluations: list[Evaluation], comparison: Comparison | None) -> None:
    from ..evaluate.report import comparison_table, tables

    out = console()
    for evaluation in evaluations:
        say(out, visible(_heading(evaluation)))
        for table in tables(evaluation):
            show(out, table)
        say(out)
    if comparison:
        for side, source in (("A", comparison.a), ("B", comparison.b)):
            say(out, visible(f"{side}: {source}"))
        show(out, comparison_table(comparison))


def _heading(evaluation: Evaluation) -> str:
    bad = len({entry.where for entry in evaluation.unusable})
    lost = f"; {bad} samples could not be used: {first_few([e.where for e in evaluation.unusable])}" if bad else ""
    return f"{evaluation.source}: {len(evaluation.rows)} answers{lost}"
