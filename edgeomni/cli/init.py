"""`edgeomni init`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .common import force_option, options

if TYPE_CHECKING:
    from ..model.swap import Swapped
    from ..model.swap_notes import Notes

PARTS = ("encoder", "llm", "codec")
CHANGES = ("adapter", "tts_layers", "streams")
"""Options that say how parts are joined."""
PRESETS = ("mini-omni", "nano", "tiny")
ANY_PRESET = f"--preset {'|'.join(PRESETS)} --random"

parts = options(
    click.option("--encoder", help="Whisper encoder: hub id or directory (openai/whisper-small)."),
    click.option("--llm", help="Qwen2, Qwen3, Llama or Mistral: hub id, directory or GGUF file (Qwen/Qwen2-0.5B)."),
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
    click.option("--preset", type=click.Choice(PRESETS), help="Sizes of a known model."),
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
@click.option("--licence", help="What the checkpoint states as the licence of its parts, where you may choose it.")
@force_option
def init_(
    output: str, recipe: bool, words: tuple[str, ...], half: bool, licence: str | None, force: bool, **source: Any
) -> None:
    """Compose a checkpoint from parts, swap parts of one, or make one with random weights.

    \b
    edgeomni init --encoder openai/whisper-small --llm Qwen/Qwen2-0.5B --codec hubertsiuzdak/snac_24khz -o ckpt
    edgeomni init --from ckpt --codec kyutai/mimi -o other
    edgeomni init --preset tiny --random --seed 0 -o ckpt
    edgeomni init --preset nano --random --words train.jsonl -o ckpt
    """
    check_source(source, recipe)
    check_writing(source, recipe, words, half)
    if recipe and licence is not None:
        raise UsageError("--recipe writes only a name and a seed, and no licence; leave --licence out")
    from ..model import checkpoints

    checkpoints.check_target(output, force=force)
    if recipe:
        checkpoints.save_preset(source["preset"], source["seed"], output, force=force)
        told = list[str]()
    else:
        model, told = _made(source, words, half or licence is not None)
        if licence is not None:
            model.licences = dict.fromkeys(model.licences, licence)
        checkpoints.save(model, output, force=force, half=half)
    for line in [*told, f"{output}: written"]:
        click.echo(line, err=True)


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


def check_source(source: dict[str, Any], recipe: bool) -> None:
    """Raises UsageError unless the options name three parts, a random preset, or a checkpoint and parts to swap."""
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
        raise UsageError(f"give --encoder, --llm and --codec, or {ANY_PRESET}")
    if recipe and not source["preset"]:
        raise UsageError(f"--recipe needs {ANY_PRESET}")


def check_writing(source: dict[str, Any], recipe: bool, words: Sequence[str], half: bool) -> None:
    """Raises UsageError for options that say how weights are drawn or stored where there is nothing of the kind."""
    if half and recipe:
        raise UsageError("--recipe writes no weights that --half could store; leave one of them out")
    if words and (recipe or not source["preset"]):
        raise UsageError(
            f"--words is the vocabulary of new random weights; give it with {ANY_PRESET}, without --recipe"
        )


def check_preset(preset: str | None, random: bool) -> None:
    """Raises UsageError unless both are given, or neither."""
    if preset and not random:
        raise UsageError(f"--preset {preset} is a model's sizes without trained weights: say --random, or give parts")
    if random and not preset:
        raise UsageError(f"--random needs --preset {'|'.join(PRESETS)}")


def texts_of(data: Sequence[str]) -> Iterator[str]:
    """Everything that is said or written in samples: system prompts, earlier turns, questions, answers.

    Raises DataError for data that cannot be read; a sample without a text or an answer cannot.
    """
    from ..data.readers import read_data

    for source in data:
        for sample in read_data(source).samples:
            turns = [*sample.history, (sample.text, sample.answer)]
            yield from (text for text in (sample.system, *(part for turn in turns for part in turn)) if text)


def _made(source: dict[str, Any], words: Sequence[str], may_copy: bool) -> tuple[Any, list[str]]:
    """The checkpoint to write, and what there is to say of it."""
    from ..model import checkpoints

    if source["start"] and may_copy and not any(source[k] for k in (*PARTS, *CHANGES)):
        return checkpoints.load(source["start"]), []
    if source["start"]:
        swapped = _swap(source)
        return swapped.model, swap_lines(swapped.notes)
    model = _build(source, words)
    untrained = model.provenance.get("untrained")
    return model, [untrained_sentence(untrained)] if untrained else []


def _build(source: dict[str, Any], data: Sequence[str]) -> Any:
    from ..model import checkpoints
    from ..model.preset_words import split_words

    if source["preset"]:
        words = {word for text in texts_of(data) for word in split_words(text)}
        return checkpoints.preset(source["preset"], source["seed"], sorted(words))
    return checkpoints.compose(
        **{k: source[k] for k in (*PARTS, "streams", "seed")},
        adapter=source["adapter"] or "swiglu",
        tts_layers=source["tts_layers"] or 0,
    )


def _swap(source: dict[str, Any]) -> Swapped:
    from ..model import checkpoints
    from ..model.swap import check_options, swap

    check_options([part for part in PARTS if source[part]], **{k: source[k] for k in CHANGES})
    return swap(checkpoints.load(source["start"]), **{k: source[k] for k in (*PARTS, *CHANGES, "seed")})
