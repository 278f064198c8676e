"""`edgeomni init`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import UsageError
from .common import force_option, options

parts = options(
    click.option("--encoder", help="Whisper encoder: hub id or directory (openai/whisper-small)."),
    click.option("--llm", help="Qwen2, Qwen3, Llama or Mistral: hub id or directory (Qwen/Qwen2-0.5B)."),
    click.option("--codec", help="SNAC or Mimi: hub id or directory (hubertsiuzdak/snac_24khz)."),
    click.option("--adapter", type=click.Choice(["linear", "swiglu"]), default="swiglu", show_default=True),
    click.option("--tts-layers", type=click.IntRange(0), default=0, show_default=True, help="Blocks of a TTS adapter."),
    click.option(
        "--streams", type=click.IntRange(1), help="Codebooks of Mimi that the model speaks [default: up to 8]."
    ),
)
random_source = options(
    click.option("--preset", type=click.Choice(["mini-omni", "tiny"]), help="Sizes of a known model."),
    click.option("--random", is_flag=True, help="Random weights, for benchmarks and tests (needed by --preset)."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random weights."),
)


@click.command("init")
@parts
@random_source
@click.option("-o", "--output", required=True, help="Checkpoint directory to write.")
@click.option("--recipe", is_flag=True, help="With --preset: write only name and seed; loading draws the weights.")
@force_option
def init_(output: str, recipe: bool, force: bool, **source: Any) -> None:
    """Compose a checkpoint from parts, or make one with random weights.

    \b
    edgeomni init --encoder openai/whisper-small --llm Qwen/Qwen2-0.5B --codec hubertsiuzdak/snac_24khz -o ckpt
    edgeomni init --preset tiny --random --seed 0 -o ckpt
    """
    check_source(source, recipe)
    from ..model import checkpoints

    checkpoints.check_target(output, force=force)
    if recipe:
        checkpoints.save_preset(source["preset"], source["seed"], output, force=force)
    else:
        model = _build(source)
        checkpoints.save(model, output, force=force)
        if untrained := model.provenance.get("untrained"):
            click.echo(untrained_sentence(untrained), err=True)
    click.echo(f"{output}: written", err=True)


def untrained_sentence(untrained: str) -> str:
    """What to expect of a model whose parts in the provenance's list ("adapter, audio rows") are untrained."""
    *most, last = untrained.split(", ")
    names = f"{', the '.join(most)} and the {last}" if most else last
    return f"The {names} are untrained: this checkpoint answers noise until it is trained."


def check_source(source: dict[str, Any], recipe: bool) -> None:
    """Raises UsageError unless the options name either three parts or a random preset."""
    check_preset(source["preset"], source["random"])
    given = [k for k in ("encoder", "llm", "codec") if source[k]]
    if source["streams"] and not given:
        raise UsageError("--streams is for a Mimi codec: compose from --encoder, --llm and --codec with it")
    if source["preset"] and given:
        raise UsageError(f"--preset brings all parts; leave --{' --'.join(given)} out")
    if not source["preset"] and len(given) < 3:
        raise UsageError("give --encoder, --llm and --codec, or --preset mini-omni|tiny --random")
    if recipe and not source["preset"]:
        raise UsageError("--recipe needs --preset mini-omni|tiny --random")


def check_preset(preset: str | None, random: bool) -> None:
    if preset and not random:
        raise UsageError(f"--preset {preset} has no trained weights to offer: say --random, or compose from parts")
    if random and not preset:
        raise UsageError("--random needs --preset mini-omni|tiny")


def _build(source: dict[str, Any]) -> Any:
    from ..model import checkpoints

    if source["preset"]:
        return checkpoints.preset(source["preset"], source["seed"])
    options = ("encoder", "llm", "codec", "adapter", "tts_layers", "streams", "seed")
    return checkpoints.compose(**{k: source[k] for k in options})
