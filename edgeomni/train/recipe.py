"""Training recipes: one file with all steps from nothing to a trained model, run one after the other, resumable.

Each step is one `edgeomni` command, run in a process of its own within the recipe's folder, so that a recipe does
nothing that a user could not do by hand. DIR/steps.json says which are done.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from msgspec import Meta

from ..errors import TrainError, UsageError
from ..outputs import named, write_file
from ..schema import Source, parse_toml, read_bytes, typed

Some = Annotated[str, Meta(min_length=1, max_length=1000)]
STEPS = "steps.json"


@dataclass(frozen=True)
class Step:
    """`run`: an edgeomni command without its first word. `makes`: the file or folder that it leaves in DIR."""

    name: Some
    makes: Some
    run: Some

    @property
    def words(self) -> list[str]:
        return shlex.split(self.run)


@dataclass(frozen=True)
class TrainingRecipe:
    """`files`: name -> content of the configurations that the steps read, written into DIR first."""

    title: str
    steps: Annotated[list[Step], Meta(min_length=1)]
    files: dict[str, str] = field(default_factory=dict)


Run = Callable[[list[str], Path], int]
"""Runs an edgeomni command with these words in this folder, and returns its exit code."""


def recipe_names() -> list[str]:
    """The training recipes that EdgeOmni ships."""
    return sorted(path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml"))


def load_recipe(name: str) -> TrainingRecipe:
    """A shipped recipe by its name, or a .toml file. Raises UsageError for an unknown name, TrainError for a bad file."""
    path = Path(name) if name.endswith(".toml") else None
    if path is None and name not in recipe_names():
        raise UsageError(
            f"no training recipe {name!r}; EdgeOmni ships {', '.join(recipe_names())}, or give a .toml file"
        )
    source = Source(name, TrainError, "correct the recipe")
    raw = read_bytes(path, source) if path is not None else (_shipped() / f"{name}.toml").read_bytes()
    recipe = typed(parse_toml(raw, source), TrainingRecipe, source)
    _check(recipe, name)
    return recipe


def follow_recipe(
    recipe: TrainingRecipe, folder: str | Path, say: Callable[[str], None], run: Run | None = None
) -> None:
    """Runs the steps that are not done yet in `folder`, which is made where it does not exist.

    A step that was interrupted goes on from its last saved state. Raises UsageError where a step that is done was
    another one than the recipe has now, and TrainError where a step fails.
    """
    run = run or _as_process
    root = named(folder)
    root.mkdir(parents=True, exist_ok=True)
    done = _done(root)
    marks = {step.name: _mark(step, recipe) for step in recipe.steps}
    for step in recipe.steps:
        if step.name in done and done[step.name]["mark"] != marks[step.name]:
            raise UsageError(
                f"{root}: its step {step.name!r} was run with another recipe; take another folder, or remove "
                f"{root / step.makes} and its entry in {root / STEPS}"
            )
    for name, content in recipe.files.items():
        write_file(root / name, content.encode(), force=True)
    for number, step in enumerate(recipe.steps, 1):
        title = f"step {number} of {len(recipe.steps)}, {step.name}"
        if step.name in done:
            say(f"{title}: done already")
            continue
        words = _words(step, root)
        say(f"{title}: edgeomni {shlex.join(words)}")
        started = perf_counter()
        if code := run(words, root):
            raise TrainError(f"{title} ended with exit code {code}; the same command goes on from here once it can")
        if not (root / step.makes).exists():
            raise TrainError(f"{title} has not made {root / step.makes}; correct the recipe")
        done[step.name] = {"mark": marks[step.name], "seconds": round(perf_counter() - started, 1)}
        write_file(root / STEPS, (json.dumps(done, indent=1) + "\n").encode(), force=True)


def _words(step: Step, root: Path) -> list[str]:
    """The step's command; for a training run that has begun, the one that goes on with it."""
    made = root / step.makes
    if step.words[0] not in ("train", "train-codec") or not made.exists():
        return step.words if not made.exists() else [*step.words, "--force"]
    from .states import last_whole_state

    if (made / "state.pt").is_file() or last_whole_state(made / "states") is not None:
        return [step.words[0], "-o", step.makes, "--resume"]
    shutil.rmtree(made)  # nothing of it was saved: killed before its first state
    return step.words


def _mark(step: Step, recipe: TrainingRecipe) -> str:
    """A hash of the command and of the files that it names."""
    read = {name: content for name, content in recipe.files.items() if name in step.words}
    return hashlib.sha256(json.dumps([step.words, step.makes, read]).encode()).hexdigest()


def _done(root: Path) -> dict[str, Any]:
    if not (root / STEPS).is_file():
        if any(root.iterdir()):
            raise UsageError(f"{root} holds something else; take a new folder")
        write_file(root / STEPS, b"{}\n")
    found = json.loads((root / STEPS).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UsageError(f"{root / STEPS} was not written by edgeomni train --recipe; take a new folder")
    return found


def _as_process(words: list[str], root: Path) -> int:
    return subprocess.run([sys.executable, "-m", "edgeomni", *words], cwd=root, check=False).returncode


def _shipped() -> Any:
    return files(__package__) / "recipes"


def _check(recipe: TrainingRecipe, name: str) -> None:
    made = [step.makes for step in recipe.steps]
    if len({step.name for step in recipe.steps}) < len(made):
        raise TrainError(f"{name}: two steps have one name; give each its own")
    for path in [*made, *recipe.files]:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise TrainError(f"{name}: {path} lies outside the recipe's folder; name a place within it")
