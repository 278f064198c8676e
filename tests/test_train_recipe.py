"""Training recipes: which commands are run in which order, what is done already, and what becomes of interruptions."""

from __future__ import annotations

import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue

import pytest

from edgeomni.errors import TrainError, UsageError
from edgeomni.train.recipe import TrainingRecipe, follow_recipe
from edgeomni.train.recipe_files import parse_recipe
from edgeomni.train.recipe_process import Beside

RECIPE = """
title = "a model"
[files]
"ear.toml" = 'train = ["data/train.jsonl"]'
"configs/mouth.toml" = 'checkpoint = "ear"'
[[steps]]
name = "speech"
run = "data synth --recipe en-small -o data"
makes = "data"
[[steps]]
name = "codec"
run = "train-codec --data noise.wav -o codec"
makes = "codec"
[[steps]]
name = "ear"
run = "train ear.toml -o ear"
makes = "ear"
[[steps]]
name = "bundle"
run = "export ear -o 'the bundle'"
makes = "the bundle"
"""
COMMANDS = [
    ["data", "synth", "--recipe", "en-small", "-o", "data"],
    ["train-codec", "--data", "noise.wav", "-o", "codec"],
    ["train", "ear.toml", "-o", "ear"],
    ["export", "ear", "-o", "the bundle"],
]
NAMES = ["speech", "codec", "ear", "bundle"]
OPTIONS = ["--force", "--resume", "--resume", "--force"]
"""What each command has at its end where its result is there already."""


def recipe(text: str = RECIPE) -> TrainingRecipe:
    return parse_recipe(text.encode(), "mine.toml")


class Commands:
    """Stands for edgeomni's processes: keeps their words, makes what -o says, and `codes` says how each ends."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.words, self.said = codes, list[list[str]](), list[str]()

    def __call__(self, words: list[str], root: Path, beside: Beside | None = None) -> int:
        self.words.append(words)
        name = NAMES[[command[0] for command in COMMANDS].index(words[0])]
        if name in self.codes:
            return self.codes[name]
        made = root / words[words.index("-o") + 1]
        made.mkdir(exist_ok=True)
        (made / "config.toml").touch()
        return 0

    def follow(self, folder: Path, text: str = RECIPE) -> list[str]:
        """Follows the recipe; returns the names of the steps that were begun, and forgets them."""
        self.words.clear()
        self.said.clear()
        follow_recipe(recipe(text), folder, self.said.append, self)
        return [NAMES[[command[0] for command in COMMANDS].index(words[0])] for words in self.words]


def done_in(folder: Path) -> list[str]:
    return list(json.loads((folder / "steps.json").read_text()))


def forget(folder: Path, name: str) -> None:
    """As if the process had been killed between the end of a step and the note that it is done."""
    steps = json.loads((folder / "steps.json").read_text())
    del steps[name]
    (folder / "steps.json").write_text(json.dumps(steps))


def test_the_steps_are_run_one_after_the_other_and_only_once(tmp_path: Path) -> None:
    run, folder = Commands(), tmp_path / "new" / "folder"
    assert run.follow(folder) == NAMES
    assert run.words == COMMANDS
    assert (folder / "ear.toml").read_text() == 'train = ["data/train.jsonl"]'
    assert (folder / "configs" / "mouth.toml").is_file()
    assert run.said[0] == "step 1 of 4, speech: edgeomni data synth --recipe en-small -o data"
    assert shlex.split(run.said[3].split(": edgeomni ")[1]) == COMMANDS[3]
    assert done_in(folder) == NAMES
    assert run.follow(folder) == []
    assert run.said[:4] == [f"step {i} of 4, {name}: done already" for i, name in enumerate(NAMES, 1)]


def test_a_step_that_fails_is_named_and_begun_again_the_next_time(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"step 3 of 4, ear: ended with exit code 1; the same command goes on"):
        Commands(ear=1).follow(tmp_path)
    assert done_in(tmp_path) == NAMES[:2]
    run = Commands()
    assert run.follow(tmp_path) == ["ear", "bundle"]
    assert run.words == COMMANDS[2:]  # it had left nothing, so there is nothing to resume


@pytest.mark.parametrize(("name", "option"), list(zip(NAMES, OPTIONS, strict=True)))
def test_a_step_killed_before_it_was_noted_goes_on_or_is_made_again(name: str, option: str, tmp_path: Path) -> None:
    run = Commands()
    run.follow(tmp_path)
    forget(tmp_path, name)
    assert run.follow(tmp_path) == [name]
    assert run.words == [[*COMMANDS[NAMES.index(name)], option]]
    assert sorted(done_in(tmp_path)) == sorted(NAMES)


def test_ctrl_c_notes_nothing_and_the_run_that_was_begun_goes_on(tmp_path: Path) -> None:
    def interrupted(words: list[str], root: Path, beside: Beside | None) -> int:
        code = Commands()(words, root)
        if words[0] == "train":
            raise KeyboardInterrupt
        return code

    with pytest.raises(KeyboardInterrupt):
        follow_recipe(recipe(), tmp_path, lambda line: None, interrupted)
    assert done_in(tmp_path) == NAMES[:2]
    run = Commands()
    assert run.follow(tmp_path) == ["ear", "bundle"]
    assert run.words[0] == [*COMMANDS[2], "--resume"]


def test_a_folder_that_is_no_run_is_not_resumed_and_never_removed(tmp_path: Path) -> None:
    run = Commands(ear=2)
    (tmp_path / "steps.json").write_text("{}")
    (tmp_path / "ear").mkdir()
    (tmp_path / "ear" / "mine.txt").write_text("mine")
    with pytest.raises(TrainError, match="exit code 2"):
        run.follow(tmp_path)
    assert run.words[-1] == COMMANDS[2]  # the trainer itself says that the folder is in use
    assert (tmp_path / "ear" / "mine.txt").read_text() == "mine"


def test_a_step_that_does_not_make_what_it_says(tmp_path: Path) -> None:
    text = RECIPE.replace('makes = "the bundle"', 'makes = "bundle"')
    with pytest.raises(TrainError, match=r"step 4 of 4, bundle: has not made .*bundle; correct"):
        Commands().follow(tmp_path, text)
    assert done_in(tmp_path) == NAMES[:3]


def test_what_was_removed_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    run = Commands()
    run.follow(tmp_path)
    (tmp_path / "codec" / "config.toml").unlink()
    (tmp_path / "codec").rmdir()
    assert run.follow(tmp_path) == ["codec"]


CHANGES: dict[str, tuple[tuple[str, str], list[str]]] = {
    "a command, and what was made of its result": (("en-small", "repeat"), ["speech", "ear", "bundle"]),
    "a command that nothing depends on": (("noise.wav", "other.wav"), ["codec"]),
    "a file that a step names": (("data/train.jsonl", "data/test.jsonl"), ["ear", "bundle"]),
    "what a step makes": (("the bundle", "a bundle"), []),
    "a file that no step names": (('checkpoint = "ear"', 'checkpoint = "data"'), []),
    "the title": (("a model", "another"), []),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_recipe_that_has_changed_does_not_mix_with_what_it_made_before(case: str, tmp_path: Path) -> None:
    (old, new), stale = CHANGES[case]
    run, text = Commands(), RECIPE.replace(old, new)
    assert text != RECIPE
    run.follow(tmp_path)
    if stale:
        with pytest.raises(UsageError, match=f"has changed since it did {', '.join(stale)}; remove") as caught:
            run.follow(tmp_path, text)
        assert run.words == [] and (tmp_path / "ear.toml").read_text() == 'train = ["data/train.jsonl"]'
    for name in stale:
        made = tmp_path / COMMANDS[NAMES.index(name)][-1]
        assert str(made) in str(caught.value)
        (made / "config.toml").unlink()
        made.rmdir()
    assert run.follow(tmp_path, text) == (stale or (["bundle"] if "bundle" in new else []))
    assert run.follow(tmp_path, text) == []


def test_a_step_put_between_others_is_the_only_one_that_runs(tmp_path: Path) -> None:
    steps = RECIPE.split("[[steps]]")
    codec = steps.pop(2)
    run = Commands()
    assert run.follow(tmp_path, "[[steps]]".join(steps)) == ["speech", "ear", "bundle"]
    steps.insert(2, codec)
    assert run.follow(tmp_path, "[[steps]]".join(steps)) == ["codec"]


def test_files_are_as_the_recipe_has_them_and_a_changed_one_is_told(tmp_path: Path) -> None:
    run = Commands()
    run.follow(tmp_path)
    (tmp_path / "ear.toml").write_text("mine")
    run.follow(tmp_path)
    assert run.said[0] == f"{tmp_path / 'ear.toml'}: was not what the recipe says, and is written again"
    assert (tmp_path / "ear.toml").read_text() == 'train = ["data/train.jsonl"]'
    run.follow(tmp_path)
    assert "written again" not in " ".join(run.said)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("thesis.txt", "mine", "holds thesis.txt and no steps.json"),
        ("steps.json", "{", "steps.json: not valid JSON"),
        ("steps.json", "[1]", "steps.json: holds a list"),
        ("steps.json", '{"speech": {"mark": 3, "seconds": 1.0}}', r"\$\.speech\.mark"),
    ],
)
def test_a_folder_that_no_recipe_made_is_left_alone(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    run = Commands()
    with pytest.raises(UsageError, match=message):
        run.follow(tmp_path)
    assert run.words == [] and [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file is a file; give a folder"):
        Commands().follow(tmp_path / "file")


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    def second(words: list[str], root: Path, beside: Beside | None) -> int:
        with pytest.raises(UsageError, match="another process is at work in it"):
            Commands().follow(tmp_path)
        return Commands()(words, root)

    follow_recipe(recipe(), tmp_path, lambda line: None, second)
    assert done_in(tmp_path) == NAMES
    assert Commands().follow(tmp_path) == []  # and the lock is gone


def test_a_disk_that_refuses_is_told_and_nothing_counts_as_done_that_was_not_noted(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(words: list[str], root: Path, beside: Beside | None) -> int:
        code = Commands()(words, root)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
        return code

    try:
        with pytest.raises(TrainError, match=r"cannot be written \(File too large\); the same command goes on"):
            follow_recipe(recipe(), tmp_path, lambda line: None, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done_in(tmp_path) == []
    run = Commands()
    assert run.follow(tmp_path) == NAMES and run.words[0][-1] == "--force"


SIDE_BY_SIDE = """
title = "two branches"
[files]
"codec.toml" = 'train = ["voice/train.jsonl"]'
"ear.toml" = 'train = ["data/train.jsonl"]'
[[steps]]
name = "voice"
run = "data synth -o voice"
makes = "voice"
[[steps]]
name = "codec"
run = "train-codec codec.toml -o codec"
makes = "codec"
[[steps]]
name = "data"
run = "data synth -o data"
makes = "data"
[[steps]]
name = "ear"
run = "train ear.toml -o ear"
makes = "ear"
[[steps]]
name = "joined"
run = "init --from ear --codec codec/codec -o joined"
makes = "joined"
"""


class Gates:
    """Stands for edgeomni's processes: each begins when it is called, and ends when the test lets it, with a code."""

    def __init__(self) -> None:
        self.begun: Queue[tuple[str, Beside | None]] = Queue()
        self.ends: dict[str, Queue[int | BaseException]] = defaultdict(Queue)

    def __call__(self, words: list[str], root: Path, beside: Beside | None) -> int:
        made = words[words.index("-o") + 1]
        self.begun.put((made, beside))
        end = self.ends[made].get(timeout=30)
        if isinstance(end, BaseException):
            raise end
        (root / made).mkdir()
        return end

    def begin(self, count: int = 1) -> dict[str, Beside | None]:
        """The next `count` that begin. None may begin beside them."""
        found = dict(self.begun.get(timeout=30) for _ in range(count))
        with pytest.raises(Empty):
            self.begun.get(timeout=0.2)
        return found


@pytest.fixture
def branches(tmp_path: Path) -> Iterator[tuple[Gates, Future[None], Path]]:
    """A recipe of two branches with two jobs, begun in a thread of its own: its commands, its end, its folder."""
    gates = Gates()
    with ThreadPoolExecutor(1) as pool:
        said = list[str]()
        end = pool.submit(follow_recipe, recipe(SIDE_BY_SIDE), tmp_path / "out", said.append, gates, 2)
        yield gates, end, tmp_path / "out"


def test_steps_begin_when_what_they_name_is_done_and_at_most_two_run(
    branches: tuple[Gates, Future[None], Path],
) -> None:
    gates, end, folder = branches
    half = max(1, (os.cpu_count() or 1) // 2)
    assert gates.begin(2) == {"voice": Beside("voice", half), "data": Beside("data", half)}
    gates.ends["data"].put(0)
    assert gates.begin() == {"ear": Beside("ear", half)}
    gates.ends["voice"].put(0)
    assert gates.begin() == {"codec": Beside("codec", half)}
    gates.ends["ear"].put(0)
    assert gates.begun.empty() and not end.done()
    gates.ends["codec"].put(0)
    assert gates.begin() == {"joined": None}, "alone, it has the whole machine"
    assert sorted(done_in(folder)) == ["codec", "data", "ear", "voice"]
    gates.ends["joined"].put(0)
    end.result(timeout=30)
    assert len(done_in(folder)) == 5


def test_where_one_of_two_fails_nothing_more_begins_and_what_was_done_counts(
    branches: tuple[Gates, Future[None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gates, end, folder = branches
    gates.begin(2)
    gates.ends["data"].put(0)
    gates.begin()
    monkeypatch.setattr("edgeomni.train.recipe.end_commands", lambda tasks, grace: gates.ends["voice"].put(-15))
    gates.ends["ear"].put(3)
    with pytest.raises(TrainError, match="step 4 of 5, ear: ended with exit code 3"):
        end.result(timeout=30)
    assert gates.begun.empty() and done_in(folder) == ["data"]
