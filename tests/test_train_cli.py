"""`edgeomni train` and `edgeomni merge`, as the documents spell them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from training import data_in, figures_in, samples_in, small_config, small_model, weights_in

from edgeomni.cli import main
from edgeomni.model import checkpoints
from edgeomni.train import fit
from edgeomni.train.run import stored_config

CONFIG = """
checkpoint = "ckpt"
stage = 3
[data]
train = ["data/train.jsonl"]
[peft]
rank = 4
[optimizer]
steps = 2
batch = 2
[run]
log_every = 1
save_every = 2
"""
FAST = ("--set", "run.log_every=1", "--set", "run.save_every=2", "--set", "peft.rank=4")


def edgeomni(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt/, data/train.jsonl, config.toml, and run/, which was made of it; not to be changed."""
    root = tmp_path_factory.mktemp("train")
    checkpoints.save(small_model(), root / "ckpt")
    data_in(root / "data")
    (root / "config.toml").write_text(CONFIG)
    done = edgeomni("train", root / "config.toml", "-o", root / "run")
    assert done.exit_code == 0, done.output
    return root


def test_a_configuration_without_a_terminal(place: Path, tmp_path: Path) -> None:
    """A real process: the table of what learns first, plain lines of progress, nothing on stdout, paths of CONFIG."""
    command = [sys.executable, "-m", "edgeomni", "train", str(place / "config.toml"), "-o", "run"]
    changes = ["--set", "optimizer.steps=3", "--set", "run.save_every=3"]
    done = subprocess.run([*command, *changes], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.index("What this run teaches") < done.stderr.index("step 1/3")
    assert re.search(r"body\W+by LoRA\W+[\d,]+", done.stderr)
    assert re.search(r"encoder\W+no\W+0\b", done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert re.fullmatch(r"train: step 3/3, loss [\d.]+, [\d,]+ tokens/s, 0:00:00 left", lines[-1])
    assert done.stderr.splitlines()[-1].startswith("run/checkpoint: written, loss ")
    assert "\x1b" not in done.stderr and "Traceback" not in done.stderr
    assert [line["step"] for line in figures_in(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("stage", ["1", "end-to-end"])
def test_without_a_file(place: Path, tmp_path: Path, stage: str) -> None:
    given = ("--data", place / "data" / "train.jsonl", "--steps", 2, "--batch", 3, "--seed", 7)
    done = edgeomni("train", place / "ckpt", "--stage", stage, *given, "-o", tmp_path / "run", *FAST)
    assert done.exit_code == 0, done.output
    config = stored_config(tmp_path / "run")
    assert (config.stage, config.optimizer.steps, config.optimizer.batch, config.seed) == (stage, 2, 3, 7)
    assert checkpoints.load(tmp_path / "run" / "checkpoint").provenance["trained_in"] == stage


def test_a_run_as_the_source_means_its_checkpoint(place: Path, tmp_path: Path) -> None:
    given = ("--data", place / "data" / "train.jsonl", "--steps", 2, *FAST)
    done = edgeomni("train", place / "run", "--stage", "2", *given, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert stored_config(tmp_path / "run").checkpoint == str(place / "run" / "checkpoint")
    assert checkpoints.load(tmp_path / "run" / "checkpoint").provenance["trained_in"] == "3, 2"


def test_resume_by_the_file_and_by_the_folder_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(place)
    assert edgeomni("train", "config.toml", "-o", run).exit_code == 0
    monkeypatch.chdir(tmp_path)
    done = edgeomni("train", place / "config.toml", "--set", "optimizer.steps=4", "-o", run, "--resume")
    assert done.exit_code == 0, done.output
    done = edgeomni("train", "-o", "run", "--resume", "--set", "optimizer.steps=6")
    assert done.exit_code == 0, done.output
    assert [line["step"] for line in figures_in(run)] == [1, 2, 3, 4, 5, 6]
    done = edgeomni("train", "-o", run, "--resume", "--set", "peft.rank=8")
    assert done.exit_code == 2 and "peft.rank was 4 and is 8" in done.output


def test_the_configuration_in_a_run_repeats_it_from_anywhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    given = ("--stage", "3", "--data", "data/train.jsonl", "--steps", 2, *FAST)
    assert edgeomni("train", "ckpt", *given, "-o", tmp_path / "first").exit_code == 0
    monkeypatch.chdir(tmp_path)
    done = edgeomni("train", tmp_path / "first" / "config.toml", "-o", "again")
    assert done.exit_code == 0, done.output
    assert figures_in(tmp_path / "again") == figures_in(tmp_path / "first")
    assert weights_in(tmp_path / "again" / "checkpoint") == weights_in(tmp_path / "first" / "checkpoint")


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing to train": (("train", "-o", "new"), "give CONFIG.toml, or a checkpoint directory"),
    "no output": (("train", "config.toml"), "Missing option '-o'"),
    "a source that is not there": (("train", "missing.toml", "-o", "new"), "no such file or directory"),
    "a checkpoint without data": (("train", "ckpt", "--stage", "1", "-o", "new"), "--data is missing"),
    "an unknown stage": (("train", "ckpt", "--stage", "4", "--data", "d", "-o", "new"), "'4' is not one of"),
    "no steps": (("train", "ckpt", "--data", "d", "--steps", "0", "-o", "new"), "not in the range"),
    "an odd change": (("train", "config.toml", "--set", "steps", "-o", "new"), "section.key=value"),
    "a folder in use": (("train", "config.toml", "-o", "data"), "data exists; choose another folder"),
    "resuming what is no run": (("train", "config.toml", "-o", "data", "--resume"), "is no run"),
    "merging into what is there": (("merge", "run", "-o", "data"), "data"),
}
FAILURES: dict[str, tuple[tuple[str, ...], str]] = {
    "an unknown key": (("train", "config.toml", "--set", "optimizer.rate=1", "-o", "new"), "rate"),
    "a value that makes no sense": (("train", "config.toml", "--set", "optimizer.lr=-1", "-o", "new"), "optimizer.lr"),
    "data that is not there": (("train", "ckpt", "--data", "missing.jsonl", "-o", "new"), "no such file or folder"),
    "a checkpoint that is none": (("train", "data", "--data", "data/train.jsonl", "-o", "new"), "data"),
    "merging what is no adapter": (("merge", "ckpt", "-o", "new"), "give RUN or RUN/adapter"),
    "merging another base": (("merge", "run", "--base", "run/checkpoint", "-o", "new"), "with the hash"),
}


@pytest.mark.parametrize("case", [*USAGE, *FAILURES])
def test_mistakes(case: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words, message = {**USAGE, **FAILURES}[case]
    done = edgeomni(*words)
    assert (done.exit_code, message in done.output) == (2 if case in USAGE else 1, True), done.output
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)
    assert not (place / "new").exists()
    assert sorted(p.name for p in (place / "data").iterdir() if p.suffix != ".wav") == ["train.jsonl"]


def test_merge_a_run_and_its_adapter(place: Path, tmp_path: Path) -> None:
    for source, out in ((place / "run", "a"), (place / "run" / "adapter", "b")):
        done = edgeomni("merge", source, "-o", tmp_path / out)
        assert done.exit_code == 0 and "written" in done.output, done.output
        assert weights_in(tmp_path / out) == weights_in(place / "run" / "checkpoint")
    merged, trained = checkpoints.load(tmp_path / "a"), checkpoints.load(place / "run" / "checkpoint")
    assert merged.spec == trained.spec
    assert merged.provenance["trained_in"] == "3"


def test_merge_with_the_base_given_and_a_base_that_has_moved(place: Path, tmp_path: Path) -> None:
    data = data_in(tmp_path / "data")
    moved = checkpoints.save(small_model(), tmp_path / "first")
    given = ("--data", data, "--steps", 2, *FAST, "-o", tmp_path / "run")
    assert edgeomni("train", moved, *given).exit_code == 0
    moved.rename(tmp_path / "elsewhere")
    done = edgeomni("merge", tmp_path / "run", "-o", tmp_path / "merged")
    assert done.exit_code in (1, 2) and "first" in done.output and not (tmp_path / "merged").exists()
    done = edgeomni("merge", tmp_path / "run", "--base", tmp_path / "elsewhere", "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert weights_in(tmp_path / "merged") == weights_in(tmp_path / "run" / "checkpoint")


def test_a_run_without_lora_has_nothing_to_merge(tmp_path: Path) -> None:
    config = small_config(stage="1", optimizer={"steps": 1})
    fit(small_model(), samples_in(tmp_path / "data"), config, tmp_path / "run")
    done = edgeomni("merge", tmp_path / "run", "-o", tmp_path / "merged")
    assert done.exit_code == 2 and "nothing to merge" in done.output, done.output


def test_a_failure_while_training_has_no_traceback(place: Path, tmp_path: Path) -> None:
    """The rate is so high that the loss stops being a number."""
    wild = ("--set", "optimizer.lr=1e30", "--set", "optimizer.steps=8", "--set", "optimizer.warmup=0")
    done = edgeomni("train", place / "config.toml", *wild, "-o", tmp_path / "run")
    assert done.exit_code == 1 and "lower optimizer.lr" in done.output, done.output
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)
    assert json.loads((place / "run" / "data.json").read_text())["samples"] == 4
