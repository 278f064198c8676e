"""An evaluation and a comparison as tables for people. Figures are in hundredths, times in seconds."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from ..spec import AUDIO_OUT, Task
from .comparison import FEW, Comparison, Difference
from .metrics import less_is_better
from .result import Evaluation, Metric

WORDS = {
    "wer": "word error rate",
    "cer": "character error rate",
    "exact": "exactly right",
    "f1": "token F1",
    "heard_exact": "heard exactly right",
    "heard_wer": "word error rate as heard",
    "heard_cer": "character error rate as heard",
}
_HEARINGS = ("exact", "wer", "cer")
_TIMES = {"ttft": "first text, s", "ttfa": "first audio, s", "total": "whole turn, s", "rtf": "RTF"}


def tables(evaluation: Evaluation) -> Iterator[Table]:
    """Written answers, spoken answers (with ceiling and floor) where there are any, and times."""
    yield _written(evaluation)
    for task in evaluation.tasks:
        if task in AUDIO_OUT and "heard_exact" in evaluation.metrics(task):
            yield _spoken(evaluation, task)
    yield _times(evaluation)


def _written(evaluation: Evaluation) -> Table:
    table = _table("what it writes", "task", "figure", numbers=("%", "samples"))
    for task in evaluation.tasks:
        for name, metric in evaluation.metrics(task).items():
            if "_" not in name:
                table.add_row(task, WORDS[name], _percent(metric), str(metric.samples))
    return table


def _spoken(evaluation: Evaluation, task: Task) -> Table:
    """What was heard of the answers, of the reference recordings, and of answers against others' references."""
    table = _table(
        f"{task}: what {evaluation.recogniser} hears", "figure", numbers=("answer, %", "ceiling, %", "floor, %")
    )
    metrics = evaluation.metrics(task)
    for name in _HEARINGS:
        cells = (_percent(metrics.get(f"{kind}_{name}")) for kind in ("heard", "ceiling", "floor"))
        table.add_row(WORDS[f"heard_{name}"], *cells)
    counts = (metrics.get(f"{kind}_exact") for kind in ("heard", "ceiling", "floor"))
    table.add_row("samples", *(str(count.samples) if count else "-" for count in counts))
    return table


def _times(evaluation: Evaluation) -> Table:
    table = _table("medians over the answers", "task", numbers=(*_TIMES.values(), "cut off"))
    for task in evaluation.tasks:
        times = evaluation.timings(task)
        cut = sum(row.ended == "length" for row in evaluation.of(task))
        table.add_row(task, *(f"{times[name]:.3f}" if name in times else "-" for name in _TIMES), str(cut))
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row per figure; the interval is that of the difference."""
    numbers = ("A, %", "B, %", "B - A", f"{100 * comparison.confidence:g} % interval", "samples")
    table = _table("A against B", "task", "figure", numbers=numbers)
    table.add_column("verdict")
    for d in comparison.differences:
        interval = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
        values = f"{100 * d.a:.1f}", f"{100 * d.b:.1f}", f"{100 * d.difference:+.1f}", interval, str(d.samples)
        table.add_row(d.task, WORDS[d.metric], *values, _verdict(d))
    return table


def _verdict(difference: Difference) -> str:
    if difference.samples < FEW:
        return "too few samples"
    if not difference.clear:
        return "no clear difference"
    better = (difference.difference < 0) == less_is_better(difference.metric)
    return "B is better" if better else "A is better"


def _percent(metric: Metric | None) -> str:
    return f"{100 * metric.value:.1f}" if metric else "-"


def _table(title: str, *texts: str, numbers: tuple[str, ...]) -> Table:
    table = Table(*texts, title=title)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
