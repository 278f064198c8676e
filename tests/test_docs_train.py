"""docs/train.md against the code: its keys and defaults, its table of stages, its commands, its configurations run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer as HubTokenizer
from training import WORDS, data_in, small_model, tokenizer_json

from edgeomni.chat import ChatSpec
from edgeomni.cli import main
from edgeomni.data.readers import read_data
from edgeomni.data.recipe_files import parse_recipe
from edgeomni.errors import CheckpointError, TrainError
from edgeomni.model import checkpoints
from edgeomni.prompts import system_ids
from edgeomni.schema import Source, parse_toml
from edgeomni.spec import TASKS
from edgeomni.text import Tokenizer
from edgeomni.train import recipe_files
from edgeomni.train.augment import AugmentConfig
from edgeomni.train.config import (
    PARTS,
    STAGES,
    DataConfig,
    LearnConfig,
    LossConfig,
    OptimizerConfig,
    PeftConfig,
    RunConfig,
    TrainConfig,
    stage_tasks,
)
from edgeomni.train.config_file import read_config
from edgeomni.train.recipe import Step, TrainingRecipe
from edgeomni.train.run import RunFolder
from edgeomni.train.stages import modes_of

DOCUMENT = (Path(__file__).parents[1] / "docs" / "train.md").read_text(encoding="utf-8")
SECTIONS: dict[str, Any] = {
    "Top level": TrainConfig,
    "`[data]`": DataConfig,
    "`[learn]`": LearnConfig,
    "`[peft]`": PeftConfig,
    "`[optimizer]`": OptimizerConfig,
    "`[loss]`": LossConfig,
    "`[augment]`": AugmentConfig,
    "`[run]`": RunConfig,
    "`[chat]`": ChatSpec,
}
TABLES = {"tasks", "data", "learn", "peft", "optimizer", "loss", "augment", "run", "chat"}
"""Keys of TrainConfig that are sections of their own."""
SIGNS = ["<|im_start|>", "<|im_end|>"]
QUICK = ["optimizer.steps=2", "optimizer.batch=3", "run.log_every=1", "run.save_every=2", "run.validate_every=2"]


def blocks(kind: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.M | re.S)
    return [text for found, text in fenced if found == kind]


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the first table below a heading."""
    section = DOCUMENT.split(f"## {heading}\n", 1)[1].split("\n#", 1)[0]
    table = section[section.index("\n|") :].split("\n\n", 1)[0].strip().splitlines()
    yield from ([cell.strip() for cell in line.strip("|").split("|")] for line in [table[0], *table[2:]])


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def default_of(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def block_with(text: str, kind: str = "toml") -> str:
    (found,) = [block for block in blocks(kind) if text in block]
    return found


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_in_its_table_with_its_default(heading: str) -> None:
    told: dict[str, str | None] = {}
    for keys, defaults, _ in list(rows(heading))[1:]:
        named, values = quoted(keys), quoted(defaults)
        assert values == [] or len(values) == len(named), keys
        told |= dict(zip(named, values, strict=True)) if values else dict.fromkeys(named)
    known = {f.name: default_of(f) for f in fields(SECTIONS[heading])}
    if heading == "Top level":
        known = {name: value for name, value in known.items() if name not in TABLES}
    assert told.keys() == known.keys()
    for name, text in told.items():
        if text is None:  # said in words: what the stage decides, and ChatML, which does not fit into a table's cell
            assert known[name] is None or name == "system_format"
        else:
            read = parse_toml(f"value = {text}".encode(), Source(name, TrainError, ""))["value"]
            value = known[name]
            assert read == (list(value) if isinstance(value, tuple) else value)
            assert isinstance(read, (bool, str)) == isinstance(value, (bool, str))


def test_every_section_has_a_table() -> None:
    sections = {f.name for f in fields(TrainConfig)} & TABLES
    assert sections == TABLES
    assert {quoted(name)[0].strip("[]") for name in SECTIONS if "[" in name} == TABLES - {"tasks"}
    assert re.search(
        r"`\[tasks\]` holds " + ".*".join(f"`{task}`" for task in ("asr", "at", "aa", "tt", "ta")), DOCUMENT
    )


def test_the_table_of_stages_is_the_rule() -> None:
    header, *lines = rows("The stages")
    assert header[2:] == list(STAGES)
    shown = {"freeze": "–", "lora": "LoRA", "train": "whole"}
    parts = {quoted(line[0])[0]: line[2:] for line in lines if "`" in line[0]}
    wanted = {stage: modes_of(TrainConfig(stage=stage)) for stage in STAGES}
    assert parts == {part: [shown[wanted[stage][part]] for stage in STAGES] for part in PARTS}
    (tasks,) = [line[2:] for line in lines if line[0] == "*tasks*"]
    for stage, cell in zip(STAGES, tasks, strict=True):
        said = set(TASKS) if cell == "all five" else set(cell.split(", "))
        assert said == set(stage_tasks(TrainConfig(stage=stage)))


def test_the_table_of_a_runs_files_names_them_all() -> None:
    told = {quoted(line[0])[0].rstrip("/") for line in list(rows("What a run leaves behind"))[1:]}
    places = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    assert told == {getattr(RunFolder(Path("run")), name).name for name in places}


def test_the_toml_blocks_are_read(tmp_path: Path) -> None:
    configs = [block for block in blocks("toml") if "[[" not in block]
    assert len(configs) == len(blocks("toml")) - 2 == 3
    for text in configs:
        path = tmp_path / "config.toml"
        path.write_text(text)
        read_config(path)
    parse_recipe(block_with("[[topics]]").encode(), "translate.toml")


def test_the_training_recipe_is_read_with_its_files_and_its_commands_are_taken(tmp_path: Path) -> None:
    recipe = recipe_files.parse_recipe(block_with("[[steps]]").encode(), "my.toml")
    for name, content in recipe.files.items():
        (tmp_path / name).write_text(content)
        read_config(tmp_path / name)
    for step in recipe.steps:
        check_command(step.words)
    keys = {quoted(line[0])[0] for line in list(rows("Recipes: from nothing to a model in one command"))[1:]}
    assert keys == {field.name for kind in (TrainingRecipe, Step) for field in fields(kind)}


def test_the_json_lines_are_read_and_serve_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(blocks("json")))
    language, at, aa = read_data(path).samples
    assert set(language.tasks()) == set(TASKS)
    assert (at.tasks(), aa.tasks()) == (("at",), ("aa",))
    assert at.system == aa.system == "Translate what you hear into Spanish."


def commands() -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    found = [shlex.split(line.split(" > ")[0]) for line in lines if line.startswith("edgeomni ")]
    inline = re.findall(r"`(?:torchrun [^`]* -m )?(edgeomni [a-z-]+ [^`]*)`", DOCUMENT)
    return [words[1:] for words in [*found, *map(shlex.split, inline)]]


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)) for words in commands()])
def test_every_command_is_one_that_edgeomni_takes(words: list[str]) -> None:
    check_command(words)


def check_command(words: list[str]) -> None:
    command: click.Command | None = main
    name = "edgeomni"
    while isinstance(command, click.Group):
        name, words = words[0], words[1:]
        command = command.get_command(click.Context(command), name)
    assert command is not None
    if words:  # a command that is only named has none
        assert command.make_context(name, words).command is command


def chat_tokenizer() -> str:
    """The small model's words, and ChatML's signs as added tokens, as Qwen's tokenizer.json has them."""
    plain = json.loads(tokenizer_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    plain["added_tokens"] = [{"id": len(WORDS) + 1 + i, "content": sign, **flags} for i, sign in enumerate(SIGNS)]
    return json.dumps(plain)


def test_signs_of_chatml_are_single_ids_where_the_tokenizer_has_them() -> None:
    spec = small_model().spec
    start, end = len(WORDS) + 1, len(WORDS) + 2
    ids = system_ids(spec, Tokenizer(chat_tokenizer(), spec.layout), "what is two")
    unknown = 0  # "system", which the small tokenizer has no word for
    said = [1 + WORDS.index(word) for word in ("what", "is", "two")]
    assert ids == [start, unknown, *said, end]
    assert Tokenizer(chat_tokenizer(), spec.layout).id_of("<|im_end|>") == end


def test_a_tokenizer_of_words_spells_the_signs_in_unknown_ids_and_has_no_stop_word() -> None:
    spec = small_model().spec
    tokenizer = Tokenizer(tokenizer_json(), spec.layout)
    ids = system_ids(spec, tokenizer, "what is two")
    assert len(ids) > 3 + 3 and ids.count(0) == len(ids) - 3
    assert HubTokenizer.from_str(tokenizer_json()).encode(SIGNS[1]).ids == [0, 0, 0]
    with pytest.raises(CheckpointError, match="not one entry"):
        tokenizer.id_of(SIGNS[1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the recipes have it: a small checkpoint that knows ChatML's signs, and data at the named places."""
    model = small_model()
    model.tokenizer_json = chat_tokenizer()
    checkpoints.save(model, tmp_path / "ckpt")
    for name, tests in {"es": ["test-voices"], "en": ["test"], "translate": ["test"]}.items():
        made = data_in(tmp_path / name, 2)
        for test in tests:
            shutil.copy(made, made.with_name(f"{test}.jsonl"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(config: str, out: str) -> None:
    """The document's configuration with so few steps that they take a second."""
    Path("config.toml").write_text(config)
    changes = [word for change in QUICK for word in ("--set", change)]
    done = CliRunner().invoke(main, ["train", "config.toml", "-o", out, *changes])
    assert done.exit_code == 0, done.output


def test_the_configuration_of_a_new_language_trains_and_measures_forgetting(folder: Path) -> None:
    trained(block_with("es/train.jsonl"), "es-run")
    found = json.loads((folder / "es-run" / "evaluation.json").read_text())
    assert found["before"]["samples"] == found["after"]["samples"] == 2
    steps = [json.loads(line) for line in (folder / "es-run" / "log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in steps)
    assert {f"loss_{task}" for task in TASKS} <= {key for line in steps for key in line}
    done = CliRunner().invoke(main, ["merge", "es-run", "-o", "merged"])
    assert done.exit_code == 0, done.output


def test_the_configuration_of_a_translator_gives_a_checkpoint_with_its_prompt(folder: Path) -> None:
    trained(block_with("translate/train.jsonl"), "translator-run")
    model = checkpoints.load(folder / "translator-run" / "checkpoint")
    assert model.spec.chat == ChatSpec(
        default_system="Translate what you hear into Spanish.", stop_words=("<|im_end|>",)
    )
    ids = system_ids(model.spec, Tokenizer(model.tokenizer_json, model.spec.layout))
    assert (ids[0], ids[-1]) == (len(WORDS) + 1, len(WORDS) + 2)
    logged = json.loads((folder / "translator-run" / "log.jsonl").read_text().splitlines()[0])
    assert {key for key in logged if key.removeprefix("loss_") in TASKS} == {"loss_at", "loss_aa"}
