"""Files of training recipes: what is refused by name, and that every shipped one could be typed by hand."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_train_recipe import RECIPE, recipe

from edgeomni.cli import main
from edgeomni.errors import TrainError, UsageError
from edgeomni.train.recipe_files import load_recipe, recipe_names

BAD: list[tuple[str, str, str]] = [
    ('title = "a model"', "", r"\$.*title"),
    ('title = "a model"', 'title = "a"\nname = "b"', r"unknown key\(s\) \$\.name"),
    ('name = "codec"', 'name = "ear"', r"\$\.steps: two steps have the same name"),
    ('name = "codec"', 'name = ""', r"\$\.steps\[1\]\.name"),
    ('makes = "codec"', "", r"\$\.steps\[1\].*makes"),
    ("codec --data noise.wav -o codec", "codec --data 'noise.wav -o codec", r"\$\.steps\[1\]\.run: .*No closing quot"),
    ('run = "data synth', 'run = "edgeomni data synth', r"\$\.steps\[0\]\.run: must begin with the command itself"),
    ('run = "data synth --recipe en-small -o data"', 'run = "  "', r"\$\.steps\[0\]\.run: must begin"),
    ('makes = "ear"', 'makes = "ear/checkpoint"', r"\$\.steps\[2\]\.makes: must be what the run's -o says, 'ear'"),
    ("train ear.toml", "train eye.toml", r"\$\.steps\[2\]\.run: 'eye\.toml' is neither in \$\.files nor made"),
    ("--recipe en-small", "--recipe mine.toml", r"\$\.steps\[0\]\.run: 'mine\.toml' is neither"),
    ("train ear.toml -o ear", "train ear.toml", r"\$\.steps\[2\]\.makes: must be what the run's -o says, ''"),
    ('makes = "data"', 'makes = "/data"', "'/data' must be a plain path"),
    ('makes = "data"', 'makes = "../data"', "'../data' must be a plain path"),
    ('makes = "data"', 'makes = "."', "'.' must be a plain path"),
    ('makes = "data"', 'makes = "data/"', "'data/' must be a plain path"),
    ('"ear.toml" =', '"/ear.toml" =', "'/ear.toml' must be a plain path"),
    ('"ear.toml" =', '"" =', "'' must be a plain path"),
    ('makes = "data"', 'makes = "the bundle"', "'the bundle' would be written twice"),
    ('makes = "data"', 'makes = "ear.toml"', "'ear.toml' would be written twice"),
    ('makes = "data"', 'makes = "steps.json"', "'steps.json' would be written twice"),
    ('"ear.toml" =', '"steps.json" =', "'steps.json' would be written twice"),
]


@pytest.mark.parametrize(("good", "bad", "named"), BAD)
def test_a_bad_recipe_is_refused_by_the_name_of_its_key(good: str, bad: str, named: str) -> None:
    assert RECIPE.count(good) == 1
    with pytest.raises(TrainError, match=named) as caught:
        recipe(RECIPE.replace(good, bad))
    assert str(caught.value).startswith("mine.toml: ") and str(caught.value).endswith("; correct the recipe")


def test_a_recipe_without_steps_is_none() -> None:
    with pytest.raises(TrainError, match=r"\$\.steps"):
        recipe('title = "nothing"\nsteps = []')


@pytest.mark.parametrize("name", ["/elsewhere/ear.toml", "data/ear.toml"])
def test_a_configuration_may_lie_elsewhere_or_be_made_by_a_step(name: str) -> None:
    found = recipe(RECIPE.replace("train ear.toml", f"train {name}"))
    assert found.steps[2].words == ["train", name, "-o", "ear"]


def test_a_recipe_is_read_by_its_path_and_shipped_ones_by_name(tmp_path: Path) -> None:
    (tmp_path / "my own.toml").write_text(RECIPE)
    assert load_recipe(str(tmp_path / "my own.toml")) == recipe()
    with pytest.raises(UsageError, match="no training recipe 'nosuch'; known are .*, or give a .toml file"):
        load_recipe("nosuch")
    with pytest.raises(TrainError, match="none.toml: cannot be read"):
        load_recipe(str(tmp_path / "none.toml"))


def test_every_command_of_a_shipped_recipe_is_one_that_edgeomni_takes() -> None:
    for name in recipe_names():
        for step in load_recipe(name).steps:
            command: click.Command | None = main
            word, words = "edgeomni", step.words
            while isinstance(command, click.Group):
                word, words = words[0], words[1:]
                command = command.get_command(click.Context(command), word)
            assert command is not None, (name, step.run)
            assert command.make_context(word, words).command is command


def test_the_recipe_of_nano_makes_its_data_by_the_recipes_of_its_name() -> None:
    steps = [step.words for step in load_recipe("nano").steps]
    made = {words[words.index("--recipe") + 1] for words in steps if words[:2] == ["data", "synth"]}
    assert {"nano", "nano-voice"} <= made


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "an unknown recipe": (["--recipe", "nosuch", "-o", "new"], 2, "no training recipe 'nosuch'"),
    "an empty name": (["--recipe", "", "-o", "new"], 2, "no training recipe ''"),
    "a bad file": (["--recipe", "bad.toml", "-o", "new"], 1, "bad.toml: "),
    "no output": (["--recipe", "good.toml"], 2, "Missing option '-o'"),
    "with a source": (["good.toml", "--recipe", "good.toml", "-o", "new"], 2, "give nothing with it but -o"),
    "with --resume": (["--recipe", "good.toml", "--resume", "-o", "new"], 2, "goes on by itself"),
    "with --steps": (["--recipe", "good.toml", "--steps", "3", "-o", "new"], 2, "give nothing with it but -o"),
    "with --seed 0": (["--recipe", "good.toml", "--seed", "0", "-o", "new"], 2, "give nothing with it but -o"),
    "with --set": (["--recipe", "good.toml", "--set", "seed=1", "-o", "new"], 2, "give nothing with it but -o"),
    "jobs without a recipe": (["good.toml", "--jobs", "2", "-o", "new"], 2, "--jobs is for --recipe alone"),
    "no jobs": (["--recipe", "good.toml", "--jobs", "0", "-o", "new"], 2, "--jobs"),
    "a folder in use": (["--recipe", "good.toml", "-o", "."], 2, "holds bad.toml, good.toml and no steps.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_on_the_command_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.toml").write_text(RECIPE)
    Path("bad.toml").write_text('title = "nothing"')
    words, code, message = MISTAKES[case]
    done = CliRunner().invoke(main, ["train", *words])
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.toml", "good.toml"]
