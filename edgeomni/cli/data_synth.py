"""`edgeomni data synth`: speech from text, after a recipe."""

from __future__ import annotations

import json
import os
from typing import Any

import click
from rich.table import Table

from ..errors import UsageError
from ..printing import say, show
from .common import console, force_option
from .counted import counted_progress


@click.command("synth")
@click.option("--recipe", metavar="NAME|FILE.toml", help="What is asked and answered; --list-recipes shows the names.")
@click.option("-o", "--output", metavar="DIR", help="Folder to make.")
@click.option("--language", metavar="CODE", help="en-us, es, cmn, for instance [default: the recipe's first].")
@click.option("--text", type=click.Path(), help="Sentences for recipes that speak a file, one to a line.")
@click.option("--samples", type=click.IntRange(1), help="Of the split train; at most as many of any other.")
@click.option("--seed", type=click.IntRange(0), help="Chooses questions, voices and noise [default: the recipe's].")
@click.option("--workers", type=click.IntRange(1), help="Processes that speak [default: all cores].")
@click.option("--rate", type=int, default=16_000, show_default=True, help="Sample rate of the recordings in Hz.")
@click.option(
    "--format", type=click.Choice(["wav", "flac"]), default="wav", show_default=True, help="Of the recordings."
)
@click.option("--list-voices", is_flag=True, help="Show the languages and variants, or the voices of --language.")
@click.option("--list-recipes", is_flag=True, help="Show the recipes that EdgeOmni ships.")
@force_option
def synth_(
    recipe: str | None, output: str | None, list_voices: bool, list_recipes: bool, workers: int | None, **how: Any
) -> None:
    """Make training and test data that espeak-ng speaks: recordings, train.jsonl, and a file for each held-out split.

    \b
    edgeomni data synth --recipe en-small -o DIR --samples 1000
    edgeomni data synth --recipe repeat --language es --text sentences.txt -o DIR
    edgeomni data synth --list-voices --language cmn

    Many voices ask, and one answers. The same recipe, language, text and seed give the same files.
    """
    if list_voices or list_recipes:
        _list(list_voices, list_recipes, how["language"])
        return
    if recipe is None or output is None:
        raise UsageError("give --recipe and -o DIR, or --list-recipes or --list-voices")
    from ..data.synth import ABOUT, synthesize

    with counted_progress("synth", "recordings") as progress:
        made = synthesize(recipe, output, workers=workers or os.cpu_count() or 1, progress=progress, **how)
    show(console(), _splits(json.loads((made / ABOUT).read_text(encoding="utf-8"))))
    say(console(), f"{output}: speech in {how['format'].upper()} at {how['rate']} Hz")


def _splits(about: dict[str, Any]) -> Table:
    table = Table(title=f"{about['recipe']}, {about['language']}, seed {about['seed']}")
    table.add_column("file")
    names = list(next(iter(about["splits"].values())))
    for name in names:
        table.add_column(name, justify="right")
    for split, figures in about["splits"].items():
        table.add_row(f"{split}.jsonl", *(str(figures[name]) for name in names))
    return table


def _list(voices: bool, recipes: bool, language: str | None) -> None:
    out = console()
    if recipes:
        show(out, _recipes())
    if voices and language is not None:
        from ..data import espeak

        for voice in espeak.voices(language):
            say(out, voice)
    elif voices:
        _list_all(out)


def _recipes() -> Table:
    from ..data.recipe_files import load_recipe, recipe_names

    table = Table("recipe", "languages", "what it makes", title="recipes")
    for name in recipe_names():
        recipe = load_recipe(name)
        table.add_row(name, ", ".join(recipe.languages) or "any", recipe.title)
    return table


def _list_all(out: Any) -> None:
    from ..data import espeak

    table = Table("language", "name", title="languages")
    for code, listed in espeak.languages().items():
        table.add_row(code, listed.name)
    show(out, table)
    table = Table("variant", "gender", title="variants of every language, as in en-us+f2")
    for name, gender in espeak.variants().items():
        table.add_row(name, gender)
    show(out, table)
