"""The page of a check: its figures, a picture of the histograms, and every finding, in one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from ..errors import DataError
from ..install_hint import install_command
from .check import MEANING, CheckReport, histogram

MOST_FINDINGS = 5000
MOST_SHARES = 30
"""Rows of the tables on the page. What is left out is counted there; `--json` has all findings."""
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 70rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; } table { border-collapse: collapse; margin-bottom: 1.5rem; max-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ddd;
  unicode-bidi: isolate; overflow-wrap: break-word; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.unusable { color: #a11212; } .warning { color: #7a5200; } .passed { color: #17631c; }
"""


def check_matplotlib() -> None:
    """Raises DataError that says what to install where the page's picture cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as exc:
        raise DataError(
            f"the HTML report needs matplotlib, which is not installed: {install_command('train')}; "
            "without it, leave --html out"
        ) from exc


def html(report: CheckReport, title: str) -> str:
    """The whole page; nothing is fetched from elsewhere, and texts from the data are shown as they are.

    Raises DataError where matplotlib is not installed.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{_verdict(report)}\n"
        f"{_figures(report)}\n<h2>Recordings</h2>\n{_picture(report)}\n"
        f"<h2>What is in the data</h2>\n{_contents(report)}\n<h2>Findings</h2>\n{_findings(report)}\n</body></html>\n"
    )


def svg(report: CheckReport) -> bytes:
    """Histograms of the questions' and answers' durations and of the sample rates, as one SVG picture."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    questions, answers, rates = figure.subplots(1, 3)
    for axes, name, seconds in ((questions, "questions", report.question_s), (answers, "answers", report.answer_s)):
        bars = histogram(seconds)
        axes.set(title=f"Duration of spoken {name}", xlabel="seconds", ylabel="samples")
        if bars["counts"]:
            axes.stairs(bars["counts"], bars["edges_s"], fill=True)
        else:
            axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
    if report.question_s.max(initial=0) > report.limits.window_s:
        questions.axvline(report.limits.window_s, color="#a11212", linestyle="--", label="encoder window")
        questions.legend()
    rates.bar([f"{rate / 1000:g}" for rate in report.rates], list(report.rates.values()))
    rates.set(title="Sample rates", xlabel="kHz", ylabel="recordings")
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _picture(report: CheckReport) -> str:
    data = base64.b64encode(svg(report)).decode()
    return f'<img alt="Histograms of durations and sample rates" src="data:image/svg+xml;base64,{data}">'


def _verdict(report: CheckReport) -> str:
    unusable, lines = len(report.unusable()), report.counts().get("line", 0)
    if report.passed():
        return '<p class="passed">Every sample can be used.</p>'
    more = f" {lines} further lines could not be read as samples." if lines else ""
    return f'<p class="unusable">{unusable} of {len(report.samples)} samples cannot be used.{more}</p>'


def _figures(report: CheckReport) -> str:
    rows = [
        ("samples", f"{len(report.samples)}"),
        ("spoken questions", f"{report.question_s.sum() / 3600:.2f} h"),
        ("spoken answers", f"{report.answer_s.sum() / 3600:.2f} h"),
        ("encoder window", f"{report.limits.window_s:g} s"),
        ("most letters per second", f"{report.limits.chars_per_s:g}"),
    ]
    return _table((), rows, numbers=1)


def _contents(report: CheckReport) -> str:
    tables = [_table(("Task", "Samples"), [(name, str(count)) for name, count in report.tasks().items()], numbers=1)]
    for name, title in (("language", "Language"), ("speaker", "Speaker")):
        shares = report.shares(name)  # type: ignore[arg-type]
        rows = [(key, str(count), f"{hours:.2f}") for key, (count, hours) in shares.items()]
        tables.append(
            _table((title, "Samples", "Hours"), rows[:MOST_SHARES], numbers=2) + _rest(len(rows), MOST_SHARES)
        )
    return f'<div class="tables">{"".join(f"<div>{table}</div>" for table in tables)}</div>'


def _findings(report: CheckReport) -> str:
    if not report.findings:
        return "<p>Nothing was found.</p>"
    counts = [(kind, MEANING[kind], str(count)) for kind, count in report.counts().items()]
    rows = [(f.where, "unusable" if f.unusable else "warning", f.kind, f.what) for f in report.findings[:MOST_FINDINGS]]
    every = _table(("Where", "", "Kind", "What"), rows, marked=1)
    return (
        _table(("Kind", "A sample", "Number"), counts, numbers=1) + every + _rest(len(report.findings), MOST_FINDINGS)
    )


def _rest(count: int, shown: int) -> str:
    return f"<p>{count - shown} more are not shown here; --json lists all.</p>" if count > shown else ""


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0, marked: int | None = None) -> str:
    """`numbers`: how many columns from the right hold numbers. `marked`: the column whose words are classes too."""
    head = "".join(_cell("th", text, i, len(headers), numbers, None) for i, text in enumerate(headers))
    body = "".join(
        f"<tr>{''.join(_cell('td', text, i, len(row), numbers, marked) for i, text in enumerate(row))}</tr>\n"
        for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if head else ''}\n{body}</table>"


def _cell(tag: str, text: str, column: int, columns: int, numbers: int, marked: int | None) -> str:
    kind = "number" if column >= columns - numbers else text if column == marked else ""
    return f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</{tag}>"
