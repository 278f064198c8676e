"""Training recipes: one file with all steps from nothing to a trained model, one or a few at a time, resumable.

Each step is one `edgeomni` command, run in a process of its own within the recipe's folder, so that a recipe does
nothing that a user could not do by hand. DIR/steps.json says which are done. docs/train.md describes the format;
recipe_files.py reads it, recipe_process.py runs the commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated

from msgspec import Meta

from ..errors import EdgeOmniError, TrainError, UsageError
from ..outputs import first_few, named, write_file
from ..schema import Source, parse_json, read_bytes, typed
from ..workspaces import orderly_end
from .recipe_process import GLANCE_S, GRACE_S, Beside, alone_in, end_commands, ended, run_command

Some = Annotated[str, Meta(min_length=1, max_length=1000)]
STEPS = "steps.json"
TRAINERS = ("train", "train-codec")
"""Commands that go on with what they began: by --resume. The others begin again: with --force."""
_RUN_CONFIG = "config.toml"
"""What every begun run of a trainer has (train/run.py, train/codec_fit.py)."""


@dataclass(frozen=True)
class Step:
    """`run`: an edgeomni command without its first word. `makes`: the file or folder that it leaves in DIR."""

    name: Some
    makes: Some
    run: Some

    @property
    def words(self) -> list[str]:
        """The command's words, quotes undone as a shell does it. Raises ValueError for an open quote."""
        return shlex.split(self.run)


@dataclass(frozen=True)
class TrainingRecipe:
    """`files`: name -> content of the configurations that the steps read, written into DIR first."""

    title: str
    steps: Annotated[list[Step], Meta(min_length=1)]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A step that is done: the hash of what it was (see `marks`), and how long it took, from its last start on."""

    mark: str
    seconds: float


Run = Callable[[list[str], Path, Beside | None], int]
"""Runs an edgeomni command with these words in this folder, and returns its exit code."""


def follow_recipe(
    recipe: TrainingRecipe, folder: str | Path, say: Callable[[str], None], run: Run = run_command, jobs: int = 1
) -> None:
    """Runs the steps that are not done yet in `folder`, which is made where it does not exist.

    A step is done when it was run to its end and what it makes is there. One that was interrupted goes on from its last
    saved state. `say` is told every step as it begins. With `jobs` of 2 or more, a step begins as soon as those whose
    results it names are done, while at most `jobs` run; they share the cores.

    Raises UsageError for a folder that holds something else, where a step that is done was another one than the recipe
    has now, and where another process is at work in the folder; TrainError where a step fails or the folder cannot be
    written; KeyboardInterrupt where Ctrl-C ended a step.
    """
    root = named(folder)
    with _told_folder(root), alone_in(root):
        done, now = _done(root), marks(recipe)
        _check_unchanged(recipe, done, now, root)
        _write_files(recipe, root, say)
        waiting = list[Step]()
        for step in recipe.steps:
            if step.name in done and (root / step.makes).exists():
                say(f"{_title(recipe, step)}: done already")
            else:
                waiting.append(step)

        def note(step: Step, seconds: float) -> None:
            done[step.name] = Done(now[step.name], seconds)
            _write_steps(root, done)

        if jobs == 1:
            for step in waiting:
                note(step, _take(step, _title(recipe, step), root, say, run, None))
        else:
            _take_side_by_side(recipe, waiting, root, say, run, note, jobs)
        say(f"{root / recipe.steps[-1].makes}: made, all steps are done")


def _title(recipe: TrainingRecipe, step: Step) -> str:
    return f"step {recipe.steps.index(step) + 1} of {len(recipe.steps)}, {step.name}"


def _take_side_by_side(
    recipe: TrainingRecipe,
    waiting: list[Step],
    root: Path,
    say: Callable[[str], None],
    run: Run,
    note: Callable[[Step, float], None],
    jobs: int,
) -> None:
    """Runs the steps, at most `jobs` at a time. A step that has the machine to itself runs as it would without jobs."""
    needs, left, running = needed(recipe), list(waiting), dict[Future[float], Step]()
    with orderly_end(), ThreadPoolExecutor(jobs) as pool:
        try:
            while left or running:
                undone = {step.name for step in [*left, *running.values()]}
                ready = [step for step in left if not needs[step.name] & undone][: jobs - len(running)]
                alone = len(ready) + len(running) == 1
                for step in ready:
                    left.remove(step)
                    beside = None if alone else Beside(step.makes, max(1, (os.cpu_count() or 1) // jobs))
                    task = pool.submit(_take, step, _title(recipe, step), root, say, run, beside)
                    running[task] = step
                for task in wait(running, GLANCE_S, FIRST_COMPLETED).done:
                    note(running.pop(task), task.result())
        except BaseException as exc:
            # Ctrl-C has reached the commands too, from the terminal. Where one has failed, the others are told to end.
            end_commands(running, GRACE_S if isinstance(exc, KeyboardInterrupt) else 0.0)
            raise


def needed(recipe: TrainingRecipe) -> dict[str, set[str]]:
    """Step's name -> names of the earlier steps whose results its command or the files that it names name."""
    found = dict[str, set[str]]()
    for number, step in enumerate(recipe.steps):
        said = "\n".join([" ".join(step.words[1:]), *_files_of(recipe, step).values()])
        found[step.name] = {other.name for other in recipe.steps[:number] if _names(said, other.makes)}
    return found


def _files_of(recipe: TrainingRecipe, step: Step) -> dict[str, str]:
    """The recipe's files that the step's command names."""
    words = " ".join(step.words[1:])
    return {name: text for name, text in recipe.files.items() if _names(words, name)}


def marks(recipe: TrainingRecipe) -> dict[str, str]:
    """Step's name -> a hash of its command, of the files it names, and of the earlier steps whose results it names.

    So a step's mark changes with everything in the recipe that its result depends on, and with nothing else.
    """
    found = dict[str, str]()
    needs = needed(recipe)
    for step in recipe.steps:
        read = _files_of(recipe, step)
        used = [mark for name, mark in found.items() if name in needs[step.name]]
        found[step.name] = hashlib.sha256(json.dumps([step.words, step.makes, read, used]).encode()).hexdigest()
    return found


def _names(text: str, path: str) -> bool:
    """Whether a text names a path, or something that lies in it. Names of TOML keys and tables do not count."""
    return re.search(rf"(?<![\w.-]){re.escape(path)}(?![\w.-]|\]|\s*=)", text) is not None


def _take(step: Step, title: str, root: Path, say: Callable[[str], None], run: Run, beside: Beside | None) -> float:
    """Runs a step; returns its seconds. Raises TrainError unless it ends well and makes what it says."""
    words, started = _words(step, root), perf_counter()
    say(f"{title}: edgeomni {shlex.join(words)}")
    if code := run(words, root, beside):
        raise TrainError(f"{title}: {ended(code)}; the same command goes on from here once that is put right")
    if not (root / step.makes).exists():
        raise TrainError(f"{title}: has not made {root / step.makes}; correct `run` or `makes` in the recipe")
    return round(perf_counter() - started, 1)


def _words(step: Step, root: Path) -> list[str]:
    """The step's command; where it was begun before, a trainer goes on, and all else begins again."""
    made = root / step.makes
    if step.words[0] in TRAINERS:
        return [*step.words, "--resume"] if (made / _RUN_CONFIG).is_file() else step.words
    return [*step.words, "--force"] if made.exists() else step.words


def _done(root: Path) -> dict[str, Done]:
    """What steps.json says. Raises UsageError where `root` holds other things without it, or where it is not ours."""
    path = root / STEPS
    if not path.exists():
        if there := sorted(entry.name for entry in root.iterdir()):
            raise UsageError(f"{root} holds {first_few(there)} and no {STEPS}, so no recipe made it; take a new folder")
        _write_steps(root, {})
    source = Source(str(path), UsageError, "take a new folder, or remove this file to run every step again")
    return typed(parse_json(read_bytes(path, source), source), dict[str, Done], source)


def _write_steps(root: Path, done: dict[str, Done]) -> None:
    text = json.dumps({name: asdict(step) for name, step in done.items()}, indent=1)
    write_file(root / STEPS, f"{text}\n".encode(), force=True)


def _check_unchanged(recipe: TrainingRecipe, done: dict[str, Done], now: dict[str, str], root: Path) -> None:
    """Raises UsageError where what lies in `root` was made by other steps than the recipe has now."""
    changed = [step for step in recipe.steps if step.name in done and done[step.name].mark != now[step.name]]
    if there := [step for step in changed if (root / step.makes).exists()]:
        names = ", ".join(step.name for step in there)
        made = ", ".join(str(root / step.makes) for step in there)
        raise UsageError(f"{root}: the recipe has changed since it did {names}; remove {made}, or take another folder")


def _write_files(recipe: TrainingRecipe, root: Path, say: Callable[[str], None]) -> None:
    """The recipe's files, and a word about each that was another one."""
    for name, content in recipe.files.items():
        path, data = root / name, content.encode()
        if path.is_file() and path.read_bytes() == data:
            continue
        if path.exists():
            say(f"{path}: was not what the recipe says, and is written again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data, force=True)


@contextmanager
def _told_folder(root: Path) -> Iterator[None]:
    """The recipe's folder, made where it does not exist. What the disk refuses becomes a TrainError."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; give a folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except EdgeOmniError:
        raise
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise TrainError(f"{root}: cannot be written ({reason}); the same command goes on once it can") from exc
