"""`edgeomni demo`."""

from __future__ import annotations

import click

from .common import console, force_option


@click.command("demo")
@click.argument("question", required=False)
@click.option("-o", "--output", metavar="DIR", default="nano-demo", show_default=True, help="Folder to make.")
@click.option(
    "--questions", type=click.IntRange(1), default=12, show_default=True, metavar="N", help="Asked for the table."
)
@click.option("--seed", type=click.IntRange(0), help="Chooses the questions [default: the recipe's].")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with [default: all cores].")
@force_option
def demo_(
    question: str | None, output: str, questions: int, seed: int | None, threads: int | None, force: bool
) -> None:
    """Ask the shipped model nano a spoken QUESTION (a sound file), and compare fp32, INT8 and INT4.

    Without a sound file espeak-ng speaks a question, and where it is not installed the shipped one is asked. DIR gets
    the question, the answer, a picture of both, and all figures. What this install lacks is left out.
    """
    from ..demo import demo

    demo(console(), question, output, questions=questions, seed=seed, threads=threads, force=force)
