"""`edgeomni data prepare`: log-mels and codec frames of all samples, once for one checkpoint."""

from __future__ import annotations

import click

from .common import force_option
from .counted import counted_progress
from .terminal import visible


@click.command("prepare")
@click.argument("data")
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, metavar="DIR", help="The folder to write.")
@click.option("--format", "format_", metavar="FORMAT", help="Format of DATA [default: told by what is in it].")
@click.option("--workers", type=click.IntRange(1), help="Processes that compute [default: one per core].")
@click.option(
    "--max-bad",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    metavar="N",
    help="How many samples may be left out because they cannot be used.",
)
@force_option
def prepare_(
    data: str, checkpoint: str, out: str, format_: str | None, workers: int | None, max_bad: int, force: bool
) -> None:
    """Compute what training on DATA needs of CHECKPOINT's front end and codec, once, into the folder DIR.

    Log-mels of questions and codec frames of answers go into Arrow files, which training reads from the disk as it
    needs them: give DIR to `edgeomni train --data`. They fit this front end and this codec only. After an
    interruption, also by kill -9, the same command goes on where it stopped; what is done waits in DIR.unfinished.
    """
    from ..data.readers import read_data
    from ..model import checkpoints
    from ..outputs import check_directory
    from ..train.prepare import prepare

    if not force:
        check_directory(out)
    dataset = read_data(data, format_, max_bad=max_bad)
    model = checkpoints.load(checkpoint)
    with counted_progress("prepare") as progress:
        made = prepare(dataset, model, out, workers=workers, max_bad=max_bad, force=force, progress=progress)
    bad = len(made.left_out)
    click.echo(visible(f"{out}: {len(dataset.samples) + len(dataset.faults) - bad} samples, {bad} left out"))
