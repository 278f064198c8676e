"""`edgeomni init`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, UsageError
from .common import force_option, options

if TYPE_CHECKING:
    from ..model.swap import Swapped
    from ..model.swap_notes import Notes

PARTS = ("encoder", "llm", "codec")
split_words = re.compile(r"\w+|[^\w\s]+").findall
"""As the preset's tokenizer splits text (tokenizers' Whitespace)."""

parts = options(
    click.option("--encoder", help="Whisper encoder: hub id or directory (openai/whisper-small)."),
    click.option("--llm", help="Qwen2, Qwen3, Llama or Mistral: hub id or directory (Qwen/Qwen2-0.5B)."),
    click.option("--codec", help="SNAC or Mimi: hub id or directory (hubertsiuzdak/snac_24khz)."),
    click.option(
        "--adapter",
        type=click.Choice(["linear", "swiglu"]),
        help="What stands between encoder and LLM [default: swiglu; with --from, the checkpoint's kind].",
    ),
    click.option(
        "--tts-layers",
        type=click.IntRange(0),
        help="Blocks of a TTS adapter [default: 0; with --from, as many as the checkpoint has].",
    ),
    click.option(
        "--streams", type=click.IntRange(1), help="Codebooks of Mimi that the model speaks [default: up to 8]."
    ),
)
random_source = options(
    click.option("--preset", type=click.Choice(["mini-omni", "nano", "tiny"]), help="Sizes of a known model."),
    click.option("--random", is_flag=True, help="Random weights, for benchmarks and tests (needed by --preset)."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random weights."),
)


@click.command("init")
@click.option("--from", "start", metavar="CHECKPOINT", help="Swap the given parts in this checkpoint, keep the rest.")
@parts
@random_source
@click.option("-o", "--output", required=True, help="Checkpoint directory to write.")
@click.option("--recipe", is_flag=True, help="With --preset: write only name and seed; loading draws the weights.")
@click.option(
    "--words",
    multiple=True,
    metavar="DATA",
    help="With --preset: the vocabulary is the words of these samples (as `edgeomni train` reads them). Repeatable.",
)
@click.option("--half", is_flag=True, help="Store weights as float16. With --from alone: a copy of half the size.")
@force_option
def init_(output: str, recipe: bool, words: tuple[str, ...], half: bool, force: bool, **source: Any) -> None:
    """Compose a checkpoint from parts, swap parts of one, or make one with random weights.

    \b
    edgeomni init --encoder openai/whisper-small --llm Qwen/Qwen2-0.5B --codec hubertsiuzdak/snac_24khz -o ckpt
    edgeomni init --from ckpt --codec kyutai/mimi -o other
    edgeomni init --preset tiny --random --seed 0 -o ckpt
    edgeomni init --preset nano --random --words train.jsonl -o ckpt
    """
    check_source(source, recipe, half)
    if half and recipe:
        raise UsageError("--recipe writes no weights, so that there is nothing for --half to store")
    if words and (recipe or not source["preset"]):
        raise UsageError(
            "--words gives the random weights of --preset a vocabulary; it does not go with --recipe or parts"
        )
    from ..model import checkpoints

    checkpoints.check_target(output, force=force)
    if recipe:
        checkpoints.save_preset(source["preset"], source["seed"], output, force=force)
    elif source["start"]:
        if half and not any(source[k] for k in (*PARTS, "adapter", "tts_layers", "streams")):
            checkpoints.save(checkpoints.load(source["start"]), output, force=force, half=half)
            click.echo(f"{output}: written", err=True)
            return
        swapped = _swap(source)
        checkpoints.save(swapped.model, output, force=force, half=half)
        for line in swap_lines(swapped.notes):
            click.echo(line, err=True)
    else:
        model = _build(source, words_of(words))
        checkpoints.save(model, output, force=force, half=half)
        if untrained := model.provenance.get("untrained"):
            click.echo(untrained_sentence(untrained), err=True)
    click.echo(f"{output}: written", err=True)


def untrained_sentence(untrained: str) -> str:
    """What to expect of a model whose parts in the provenance's list ("adapter, audio rows") are untrained."""
    *most, last = untrained.split(", ")
    names = f"{', the '.join(most)} and the {last}" if most else last
    are = "are" if most or last.endswith("s") else "is"
    return f"The {names} {are} untrained: this checkpoint answers noise until it is trained."


def swap_lines(notes: Notes) -> list[str]:
    """What became of each part, and which stages have to be trained, each with its reasons."""
    stages = [f"stage {stage} must be run again: {'; '.join(why)}" for stage, why in notes.stages.items()]
    return [*(f"{part}: {fate}" for part, fate in notes.parts.items()), *stages]


def check_source(source: dict[str, Any], recipe: bool, half: bool = False) -> None:
    """Raises UsageError unless the options name three parts, a random preset, or a checkpoint and parts to swap.

    `half`: a checkpoint alone is enough.
    """
    check_preset(source["preset"], source["random"])
    given = [k for k in PARTS if source[k]]
    if source["start"]:
        if source["preset"] or recipe:
            raise UsageError("--from keeps a checkpoint's weights, --preset and --recipe draw new ones; choose one")
        return
    if source["streams"] and not given:
        raise UsageError("--streams is for a Mimi codec: compose from --encoder, --llm and --codec with it")
    if source["preset"] and given:
        raise UsageError(f"--preset brings all parts; leave --{' --'.join(given)} out")
    if not source["preset"] and len(given) < 3:
        raise UsageError("give --encoder, --llm and --codec, or --preset mini-omni|nano|tiny --random")
    if recipe and not source["preset"]:
        raise UsageError("--recipe needs --preset mini-omni|nano|tiny --random")


def check_preset(preset: str | None, random: bool) -> None:
    if preset and not random:
        raise UsageError(f"--preset {preset} has no trained weights to offer: say --random, or compose from parts")
    if random and not preset:
        raise UsageError("--random needs --preset mini-omni|nano|tiny")


def words_of(data: Sequence[str]) -> list[str]:
    """The words of the samples' questions and answers, in lower case, in alphabetical order."""
    from ..data.readers import read_data

    found: set[str] = set()
    for source in data:
        for sample in read_data(source).samples:
            found.update(split_words(f"{sample.text or ''} {sample.answer or ''}".lower()))
    if data and not found:
        raise DataError(f"{', '.join(data)}: no sample has a text, so there are no words")
    return sorted(found)


def _build(source: dict[str, Any], words: Sequence[str]) -> Any:
    from ..model import checkpoints

    if source["preset"]:
        return checkpoints.preset(source["preset"], source["seed"], words)
    return checkpoints.compose(
        **{k: source[k] for k in (*PARTS, "streams", "seed")},
        adapter=source["adapter"] or "swiglu",
        tts_layers=source["tts_layers"] or 0,
    )


def _swap(source: dict[str, Any]) -> Swapped:
    from ..model import checkpoints
    from ..model.swap import check_options, swap

    options = ("adapter", "tts_layers", "streams")
    check_options([part for part in PARTS if source[part]], **{k: source[k] for k in options})
    return swap(checkpoints.load(source["start"]), **{k: source[k] for k in (*PARTS, *options, "seed")})
