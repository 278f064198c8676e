"""`edgeomni merge`."""

from __future__ import annotations

import click

from .common import force_option


@click.command("merge")
@click.argument("source")
@click.option("-o", "--output", required=True, help="Checkpoint directory to write.")
@click.option("--base", help="The checkpoint that the adapter was trained on [default: the one that it names].")
@force_option
def merge_(source: str, output: str, base: str | None, force: bool) -> None:
    """Merge SOURCE (a run's folder, or its adapter) and the checkpoint it was trained on into one checkpoint.

    \b
    edgeomni merge run -o merged
    edgeomni merge run/adapter --base ckpt -o merged
    """
    from ..train.merging import merge

    merge(source, output, base=base, force=force)
    click.echo(f"{output}: written", err=True)
