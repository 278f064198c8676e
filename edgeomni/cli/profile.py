"""`edgeomni profile`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table

from ..hardware import detect, load_profile
from ..printing import say, show
from ..profiling import compare, measure, report
from ..spec import TASKS
from .common import console, engine_options, options, overlap_option
from .turn import window_of

job_options = options(
    click.option("--turns", type=click.IntRange(1), default=3, show_default=True, help="Turns that count."),
    click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Turns before, not counted."),
    click.option("--task", type=click.Choice(TASKS), default="aa", show_default=True),
    click.option("--audio", help="The spoken question [default: synthesized vowels]."),
    click.option("--text", default="How are you?", show_default=True, help="The question of tt and ta."),
    click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Synthesized length."),
    click.option(
        "--forced-frames",
        type=click.IntRange(0),
        help="Codec frames the answer is made to have; 0: its own [default: 117 for random weights, else 0].",
    ),
    click.option("--forced-text-end", type=click.IntRange(1), help="LLM frame at which forced text ends."),
    click.option("--encoder-window", help="auto, or seconds."),
)


@click.command("profile")
@click.argument("bundle")
@job_options
@engine_options
@overlap_option
@click.option(
    "--compare", "comparing", is_flag=True, help="Every set of engines that BUNDLE has; auto then takes the best."
)
@click.option("--profile", "profile_name", help="Hardware profile whose budgets apply (a missed one exits 3).")
@click.option("--save", is_flag=True, help="Write profiles/results/<device>-<bundle>-<date>.json.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line instead of tables.")
def profile_(bundle: str, comparing: bool, profile_name: str | None, save: bool, as_json: bool, **how: Any) -> None:
    """Measure answers of BUNDLE (or a checkpoint directory) in a process of their own.

    What was measured is remembered: --engine auto chooses by it, and tells by it what a step down costs.
    """
    hardware = load_profile(profile_name) if profile_name else None
    how["encoder_window"] = window_of(how["encoder_window"])
    if hardware and not how["threads"]:
        how["threads"] = min(hardware.run.threads, detect().cores)
    job = measure.Job(bundle, **how)
    if comparing:
        result, shown = _compared(job, quiet=as_json)
    else:
        result = measure.measure_apart(job)
        shown = report.tables(result)
    if as_json:
        click.echo(report.line(result))
    else:
        out = console()
        for part in shown:
            say(out, part) if isinstance(part, str) else show(out, part)
    if save:
        click.echo(f"saved {measure.save(result)}", err=True)
    if hardware:
        hardware.judge(measure.budget_figures(result))


def _compared(job: measure.Job, quiet: bool) -> tuple[dict[str, Any], Iterator[str | Table]]:
    """The report of the set that auto takes, with the others' figures beside it, and the tables that show all."""
    found = compare.compare(job, lambda name: None if quiet else click.echo(f"measuring {name}", err=True))
    return found.to_dict(), compare.tables(found)
