"""Recipes are TOML files. EdgeOmni ships some (`recipe_names`); any other is read by its path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import DataError, UsageError
from ..schema import Source, is_newer, parse_toml, read_bytes, typed
from .recipe import RECIPE_SCHEMA, Recipe
from .recipe_checks import check_fit


def recipe_names() -> list[str]:
    """The recipes that EdgeOmni ships."""
    folder = resources.files("edgeomni.data") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or any file by its path (ending in .toml).

    Raises UsageError for a name that is not known, and DataError that names the file and the key at fault.
    """
    return parse_recipe(*recipe_bytes(name))


def recipe_bytes(name: str) -> tuple[bytes, str]:
    """The bytes of a recipe, and what messages call it. Raises as `load_recipe` does."""
    if name.endswith(".toml"):
        return read_bytes(Path(name), Source(name, DataError, "check the path")), name
    if name not in (known := recipe_names()):
        raise UsageError(f"no recipe {name!r}; known are {', '.join(known)}, or give a path to a .toml file")
    return (resources.files("edgeomni.data") / "recipes" / f"{name}.toml").read_bytes(), f"recipes/{name}.toml"


def parse_recipe(raw: bytes, where: str) -> Recipe:
    """TOML -> a recipe whose parts fit together. Raises DataError that names `where` and the key at fault."""
    source = Source(where, DataError, "correct the recipe")
    data = parse_toml(raw, source)
    if "name" in data:
        raise source.fault("unknown key(s) $.name (the file's name is the recipe's name)")
    newer = is_newer(data.get("schema", RECIPE_SCHEMA), RECIPE_SCHEMA, source)
    recipe = typed({**data, "name": Path(where).stem}, Recipe, source, newer=newer)
    check_fit(recipe, source)
    return recipe
