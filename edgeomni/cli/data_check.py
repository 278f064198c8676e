"""`edgeomni data check`: what is in the data, and what is wrong with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from ..printing import say, show
from .common import console, force_option
from .counted import counted_progress
from .terminal import plain, visible

if TYPE_CHECKING:
    from ..arrays import F64
    from ..data.check import CheckReport

FINDINGS, SHARES = 50, 10
"""How many findings, and how many languages or speakers, are listed on a terminal."""


@click.command("check")
@click.argument("data")
@click.option("--format", "format_", metavar="FORMAT", help="Format of DATA [default: told by what is in it].")
@click.option("--html", "html_", metavar="REPORT", help="Also write a page with pictures and every finding.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object on stdout.")
@click.option(
    "--fix", metavar="OUT", help="Write a cleaned list, and OUT.removed.jsonl with what is not in it, and why."
)
@click.option("--strict", is_flag=True, help="What is only a warning counts too, for --fix and for the exit code.")
@click.option("--window", type=float, metavar="SECONDS", help="What the encoder hears at once [default: 30].")
@click.option("--letters", type=float, metavar="N", help="Most letters per second that are believed [default: 30].")
@force_option
def check_(
    data: str,
    format_: str | None,
    html_: str | None,
    as_json: bool,
    fix: str | None,
    strict: bool,
    window: float | None,
    letters: float | None,
    force: bool,
) -> None:
    """Look through DATA: hours, languages, speakers, tasks, durations, sample rates, and everything wrong with it.

    Every sound is decoded once. A finding tells the file and the line. Samples cannot be used that are unreadable,
    silent, longer than the window, repeated, without what their task needs, or with more text than their sound has
    time for; sounds under 16 kHz and clipped ones are warnings. Exit code 1 if anything cannot be used.
    """
    from ..data.check import WINDOW_S, Limits, check
    from ..data.check_text import CHARS_PER_S
    from ..data.readers import read_data

    _check_outputs(html_, fix, force)
    limits = Limits(WINDOW_S if window is None else window, CHARS_PER_S if letters is None else letters)
    dataset = read_data(data, format_, max_bad=None)
    with counted_progress("check") as progress:
        report = check(dataset, limits, progress=progress)
    _write(report, data, html_, fix, strict, force)
    if as_json:
        click.echo(json.dumps({"data": data, "format": dataset.format, **report.to_dict()}))
    else:
        _print(report, data, dataset.format)
    if not report.passed(strict):
        raise click.exceptions.Exit(1)


def _check_outputs(html_: str | None, fix: str | None, force: bool) -> None:
    """Raises UsageError and DataError before minutes of work for what could not be written after them."""
    from ..data.check_fix import check_targets
    from ..data.check_report import check_matplotlib
    from ..outputs import check_file

    if html_ is not None:
        check_file(html_, force)
        check_matplotlib()
    if fix is not None:
        check_targets(fix, force)


def _write(report: CheckReport, data: str, html_: str | None, fix: str | None, strict: bool, force: bool) -> None:
    from ..data.check_fix import removed_path, write_fixed
    from ..data.check_report import html
    from ..outputs import write_file

    if html_ is not None:
        write_file(html_, html(report, f"Data check: {data}").encode("utf-8", "replace"), force)
    if fix is not None:
        stayed, went = write_fixed(report, fix, strict=strict, force=force)
        click.echo(visible(f"{fix}: {stayed} samples; {went} left out, see {removed_path(fix)}"), err=True)


def _print(report: CheckReport, data: str, format_: str) -> None:
    out = console()
    figures = Table(title=f"{visible(data)} ({format_})", show_header=False)
    for name, value in _figures(report):
        figures.add_row(plain(name), plain(value))
    show(out, figures)
    _print_findings(out, report)


def _figures(report: CheckReport) -> list[tuple[str, str]]:
    languages, speakers = report.shares("language"), report.shares("speaker")
    return [
        ("samples", f"{len(report.samples)}"),
        ("spoken questions", _durations(report.question_s)),
        ("spoken answers", _durations(report.answer_s)),
        ("tasks", ", ".join(f"{name} {count}" for name, count in report.tasks().items()) or "none"),
        ("languages", _shares(languages)),
        ("speakers", _shares(speakers)),
        ("sample rates", ", ".join(f"{rate} Hz {count}" for rate, count in report.rates.items()) or "no recordings"),
    ]


def _durations(seconds: F64) -> str:
    import numpy as np

    some = seconds[seconds > 0]
    if not len(some):
        return "none"
    shortest, median, longest = (float(value) for value in np.quantile(some, (0, 0.5, 1)))
    return (
        f"{some.sum() / 3600:.2f} h in {len(some)} samples of {shortest:.1f} to {longest:.1f} s (median {median:.1f} s)"
    )


def _shares(shares: dict[str, tuple[int, float]]) -> str:
    named = [f"{name} {hours:.2f} h ({count})" for name, (count, hours) in list(shares.items())[:SHARES]]
    rest = len(shares) - SHARES
    return ", ".join(named) + (f" and {rest} more" if rest > 0 else "") or "none"


def _print_findings(out: Console, report: CheckReport) -> None:
    from ..data.check import MEANING, WARNINGS

    if not report.findings:
        say(out, "nothing was found")
        return
    table = Table(title="findings")
    for header in ("kind", "a sample", "number", ""):
        table.add_column(header, justify="right" if header == "number" else "left")
    for kind, count in report.counts().items():
        table.add_row(kind, MEANING[kind], str(count), "warning" if kind in WARNINGS else "unusable")
    show(out, table)
    for finding in report.findings[:FINDINGS]:
        say(out, visible(f"{finding.where}: {finding.kind}: {finding.what}").replace("\n", " "))
    if (rest := len(report.findings) - FINDINGS) > 0:
        say(out, f"... and {rest} more: --html and --json list them")
