"""`edgeomni compare-runs`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ..outputs import check_file
from ..printing import show
from .common import console, force_option
from .terminal import plain

if TYPE_CHECKING:
    from ..train.compare import Comparison, Figure

_NONE = "-"
"""A cell where a run has no such figure."""


@click.command("compare-runs")
@click.argument("runs", nargs=-1, required=True, metavar="RUN_A RUN_B...")
@click.option("-o", "out", metavar="PNG", help="Also draw losses and learning rates of all runs into one picture.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line instead of tables.")
@force_option
def compare_runs_(runs: tuple[str, ...], out: str | None, as_json: bool, force: bool) -> None:
    """Show training runs side by side: configurations, losses, speed, and how well the models answer.

    The text ability before and after comes from RUN/evaluation.json, which a run with [data] text writes. For other
    figures, such as the word error rate, evaluate each run's checkpoint into RUN/evaluation-NAME.json:

    \b
    edgeomni evaluate RUN/checkpoint --data test.jsonl --json > RUN/evaluation-test.json
    """
    from ..train.compare import compare

    if out is not None:
        check_file(out, force)
    found = compare(runs)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        for table in tables(found):
            show(console(), table)
    if out is not None:
        from ..train.curves import draw_comparison

        draw_comparison({run.name: run.log for run in found.runs}, out, force)


def tables(comparison: Comparison) -> Iterator[Table]:
    """What differs in the configurations, and what came of it; a column for each run."""
    names = [run.name for run in comparison.runs]
    if comparison.differs:
        table = _table("what differs in the configurations", names)
        for key, values in comparison.differs.items():
            table.add_row(plain(key), *(plain(_NONE if value is None else value) for value in values))
        yield table
    table = _table("what came of it", names)
    for name in comparison.runs[0].figures:
        table.add_row(
            "time" if name == "seconds" else name, *(_said(name, run.figures[name]) for run in comparison.runs)
        )
    for name in dict.fromkeys(name for run in comparison.runs for name in run.shares):
        shares = (run.shares.get(name) for run in comparison.runs)
        table.add_row(plain(name), *(_NONE if share is None else f"{100 * share:.1f} %" for share in shares))
    yield table


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table("", title=title, title_justify="left")
    for name in names:
        table.add_column(plain(name), justify="right")
    return table


def _said(name: str, value: Figure) -> str:
    if value is None:
        return _NONE
    if name == "seconds":
        return str(timedelta(seconds=round(value)))
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
