"""Training recipes are TOML files. EdgeOmni ships some (`recipe_names`); any other is read by its path."""

from __future__ import annotations

from importlib import resources
from itertools import pairwise
from pathlib import Path, PurePosixPath

from ..errors import TrainError, UsageError
from ..schema import Source, parse_toml, read_bytes, typed
from .recipe import STEPS, TRAINERS, Step, TrainingRecipe

_FOLDER = resources.files("edgeomni.train") / "recipes"


def recipe_names() -> list[str]:
    """The training recipes that EdgeOmni ships."""
    there = _FOLDER.iterdir() if _FOLDER.is_dir() else ()
    return sorted(item.name.removesuffix(".toml") for item in there if item.name.endswith(".toml"))


def load_recipe(name: str) -> TrainingRecipe:
    """A shipped recipe by its name, or any file by its path (ending in .toml).

    Raises UsageError for a name that is not known, and TrainError that names the file and the key at fault.
    """
    if name.endswith(".toml"):
        return parse_recipe(read_bytes(Path(name), Source(name, TrainError, "check the path")), name)
    if name not in (known := recipe_names()):
        raise UsageError(f"no training recipe {name!r}; known are {', '.join(known) or 'none'}, or give a .toml file")
    return parse_recipe((_FOLDER / f"{name}.toml").read_bytes(), f"recipes/{name}.toml")


def parse_recipe(raw: bytes, where: str) -> TrainingRecipe:
    """TOML -> a recipe whose parts fit together. Raises TrainError that names `where` and the key at fault."""
    source = Source(where, TrainError, "correct the recipe")
    recipe = typed(parse_toml(raw, source), TrainingRecipe, source)
    for index, step in enumerate(recipe.steps):
        _check_step(step, f"$.steps[{index}]", source)
    _check_names(recipe, source)
    _check_configs(recipe, source)
    return recipe


def _check_step(step: Step, path: str, source: Source) -> None:
    try:
        words = step.words
    except ValueError as exc:
        raise source.fault(f"cannot be split into words ({exc})", f"{path}.run") from exc
    if not words or words[0] == "edgeomni":
        raise source.fault("must begin with the command itself, as in `data synth`, not with edgeomni", f"{path}.run")
    if words[0] in TRAINERS and _output_of(words) != step.makes:
        raise source.fault(
            f"must be what the run's -o says, {_output_of(words)!r}, not {step.makes!r}", f"{path}.makes"
        )


def _check_configs(recipe: TrainingRecipe, source: Source) -> None:
    """Refuses a configuration that nobody writes: training may be hours away when it would be missed."""
    made = tuple(f"{step.makes}/" for step in recipe.steps)
    for index, step in enumerate(recipe.steps):
        for word in step.words:
            there = word in recipe.files or word.startswith(made) or Path(word).is_absolute()
            if word.endswith(".toml") and not there:
                raise source.fault(f"{word!r} is neither in $.files nor made by a step", f"$.steps[{index}].run")


def _output_of(words: list[str]) -> str:
    """The word after -o or --output, "" where there is none."""
    return next((word for option, word in pairwise(words) if option in ("-o", "--output")), "")


def _check_names(recipe: TrainingRecipe, source: Source) -> None:
    """Every step has a name and a result of its own, and all that is written lies within the recipe's folder."""
    if len({step.name for step in recipe.steps}) < len(recipe.steps):
        raise source.fault("two steps have the same name", "$.steps")
    paths = [*(step.makes for step in recipe.steps), *recipe.files]
    for path in paths:
        if path != str(PurePosixPath(path)) or path.startswith("/") or path == "." or ".." in PurePosixPath(path).parts:
            raise source.fault(f"{path!r} must be a plain path within the recipe's folder, as in data/train.jsonl")
    if twice := [path for path in paths if [*paths, STEPS].count(path) > 1]:
        raise source.fault(f"{twice[0]!r} would be written twice")
