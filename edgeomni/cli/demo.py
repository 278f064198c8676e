"""`edgeomni demo`."""

from __future__ import annotations

import click

from .common import console


@click.command("demo")
@click.option("--keep", metavar="DIR", help="Leave the checkpoint, the bundles and the answers in this new folder.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random weights.")
def demo_(keep: str | None, seed: int) -> None:
    """Build, export, ask and profile a tiny model with random weights, start to end, in about a minute."""
    from ..demo import demo

    demo(console(), keep=keep, seed=seed)
