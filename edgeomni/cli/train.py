"""`edgeomni train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..printing import show
from ..shipped import found
from .common import console, options

if TYPE_CHECKING:
    from ..train.config import TrainConfig

STAGES = ("1", "2", "3", "end-to-end", "ctc")

short_options = options(
    click.option("--stage", type=click.Choice(STAGES), help="Which stage [default: 3, or what CONFIG says]."),
    click.option("--data", multiple=True, help="Samples to learn from. Repeatable."),
    click.option("--validation", multiple=True, help="Samples to validate on. Repeatable."),
    click.option("--text", "text_data", multiple=True, help="Text questions to measure forgetting with. Repeatable."),
    click.option("--steps", type=click.IntRange(1), help="Updates of the weights."),
    click.option("--batch", type=click.IntRange(1), help="Samples per batch."),
    click.option("--seed", type=click.IntRange(0), help="Seed of everything random."),
    click.option("--init", type=click.Choice(["base", "sft"]), help="sft: careful defaults, text replayed."),
)


@click.command("train")
@click.argument("source", required=False)
@short_options
@click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE", help="Any key of CONFIG. Repeatable.")
@click.option("-o", "--output", required=True, help="The run's folder.")
@click.option("--resume", is_flag=True, help="Go on from the run's last whole state.")
@click.option(
    "--recipe", metavar="NAME|FILE.toml", help="All steps from nothing to a trained model; the same again goes on."
)
@click.option("--jobs", type=click.IntRange(1), help="Steps of a recipe that run side by side [default: 1].")
def train_(
    source: str | None,
    output: str,
    changes: tuple[str, ...],
    resume: bool,
    recipe: str | None,
    jobs: int | None,
    **given: Any,
) -> None:
    """Train a checkpoint: SOURCE is a CONFIG.toml, or a checkpoint directory with --stage and --data.

    \b
    edgeomni train config.toml -o run
    edgeomni train ckpt --stage 1 --data train.jsonl -o run --steps 2000
    edgeomni train -o run --resume
    edgeomni train --recipe nano -o nano --jobs 2
    torchrun --nproc-per-node 2 -m edgeomni train config.toml -o run

    The trained checkpoint is RUN/checkpoint, LoRA is kept in RUN/adapter. With --recipe, the folder holds what each of
    the recipe's steps makes. docs/train.md tells all keys.
    """
    if recipe is not None:
        if source or resume or changes or any(value not in (None, ()) for value in given.values()):
            raise UsageError(
                "--recipe says everything itself and goes on by itself; give nothing with it but -o and --jobs"
            )
        _follow(recipe, output, jobs or 1)
        return
    if jobs is not None:
        raise UsageError("--jobs is for --recipe alone: one run is one process")
    config = _config(source, output, resume, changes, given)
    if not config.checkpoint:
        raise UsageError("the configuration names no checkpoint; set checkpoint in it, or give a checkpoint directory")
    from ..model import checkpoints
    from ..train.fitting import first_process, fit

    model = checkpoints.load(config.checkpoint)
    trained = fit(model, None, config, output, resume=resume, show=lambda table: show(console(err=True), table))
    if first_process():
        last = next((line["loss"] for line in reversed(trained.log) if "loss" in line), None)
        click.echo(f"{output}/checkpoint: written{'' if last is None else f', loss {last:.4g}'}", err=True)


def _follow(recipe: str, output: str, jobs: int) -> None:
    from ..train.recipe import follow_recipe
    from ..train.recipe_files import load_recipe

    follow_recipe(load_recipe(recipe), output, lambda line: click.echo(line, err=True), jobs=jobs)


def _config(
    source: str | None, output: str, resume: bool, changes: tuple[str, ...], given: dict[str, Any]
) -> TrainConfig:
    """CONFIG.toml, a checkpoint with options, or what the run that goes on was told; --set and options on top."""
    from ..train.config_file import from_changes, read_config, set_key
    from ..train.run import RunFolder, is_run, stored_config

    words = _as_changes(given)
    if source is None:
        if not resume:
            raise UsageError("give CONFIG.toml, or a checkpoint directory with --stage and --data")
        return stored_config(output, [*words, *changes])
    path = Path(found(source, "checkpoint"))
    if path.is_dir():
        data: dict[str, Any] = {"checkpoint": str(RunFolder(path).checkpoint if is_run(path) else path)}
        if not given["data"] and not any(change.startswith("data.train=") for change in changes):
            raise UsageError("--data is missing: name the samples to learn from")
        for word in words:
            set_key(data, word)
        return from_changes(data, changes)
    if not path.is_file():
        raise UsageError(f"{source}: no such file or directory; give CONFIG.toml or a checkpoint directory")
    return read_config(path, [*words, *changes])


def _as_changes(given: dict[str, Any]) -> list[str]:
    """The short options as changes of the configuration."""
    import json

    places = {
        "stage": "stage",
        "seed": "seed",
        "init": "init",
        "steps": "optimizer.steps",
        "batch": "optimizer.batch",
        "data": "data.train",
        "validation": "data.validation",
        "text_data": "data.text",
    }
    chosen = {place: given[name] for name, place in places.items() if given[name] not in (None, ())}
    return [f"{place}={json.dumps(value)}" for place, value in chosen.items()]
