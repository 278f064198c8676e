"""A shipped model on the command line: as SOURCE or by --model, with a question or with its own. Without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import edgeomni
from edgeomni.cli import main

NANO = Path(edgeomni.__file__).resolve().parent / "nano"
QUESTION = str(NANO / "question.wav")
WORDS = (NANO / "question.txt").read_text(encoding="utf-8").strip()
SHORT = ("--greedy", "--max-seconds", "0.5", "--threads", "1")


def command(*args: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], input=stdin)


def run(*args: object, stdin: bytes | None = None) -> Result:
    return command("run", *args, *SHORT, stdin=stdin)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with nothing in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def ids(*args: object) -> list[list[int]]:
    """All streams of the answer."""
    result = run(*args, "--tokens-out", "answer.npz", "--force")
    assert result.exit_code == 0, result.stderr
    with np.load("answer.npz") as arrays:
        found: list[list[int]] = arrays["tokens"].tolist()
    return found


# --- run


def test_source_and_option_and_path_and_own_question_are_one_answer() -> None:
    expected = ids(NANO / "bundle", QUESTION)
    assert len(expected[0]) > 0
    for asked in (["nano", QUESTION], ["--model", "nano", QUESTION], ["nano"], ["--model", "nano"]):
        assert ids(*asked) == expected
    assert ids(QUESTION, "--model", NANO / "bundle") == expected


def test_its_own_question_is_told_in_words() -> None:
    result = run("nano")
    assert result.exit_code == 0, result.stderr
    told = f"no question given, so nano is asked its own sample: {WORDS}"
    assert told in result.stderr.splitlines() and WORDS not in result.stdout
    assert told in run("--model", "nano").stderr.splitlines()


def test_a_question_of_the_users_is_not_told_as_a_sample() -> None:
    with open(QUESTION, "rb") as file:
        piped = run("nano", "-", stdin=file.read())
    for result in (run("nano", QUESTION), piped, run("nano", "-q")):
        assert result.exit_code == 0 and "sample" not in result.stderr, result.stderr


@pytest.mark.parametrize("task", ["asr", "at", "aa"])
def test_every_task_that_hears_has_its_own_question(task: str) -> None:
    result = command("run", "nano", "--task", task, "--max-length", "90", "--threads", "1", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["task"] == task and WORDS in result.stderr


@pytest.mark.parametrize("source", [["nano"], ["--model", "nano"]])
def test_text_is_asked_as_before(source: list[str]) -> None:
    result = run(*source, "--text", "tell me", "--json")
    assert result.exit_code == 0 and "sample" not in result.stderr, result.stderr
    assert json.loads(result.stdout)["task"] == "ta"
    assert ids(*source, "--text", "tell me") == ids(NANO / "bundle", "--text", "tell me")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument 'SOURCE'. Give it, or --model."),
        (["nano", "--task", "tt"], "task tt answers a written question"),
        (["nano", "--task", "ta"], "task ta answers a written question"),
        (["nano", "--task", "at", "--text", "hi"], "task at answers a spoken question"),
        (["other"], "task aa answers a spoken question: give a sound file"),
        (["./nano"], "task aa answers a spoken question: give a sound file"),
        ([str(NANO / "bundle")], "task aa answers a spoken question: give a sound file"),
        (["--model", "other"], "task aa answers a spoken question: give a sound file"),
        (["--model", "nano", "other", QUESTION], "--model nano and SOURCE other both say what to ask"),
    ],
)
def test_what_makes_no_sense_is_refused_as_before(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_a_local_folder_of_that_name_has_no_question_of_its_own() -> None:
    shutil.copytree(NANO / "bundle", "nano")
    assert run("nano").exit_code == 2
    (Path("nano") / "bundle.json").write_text("{}")
    result = run("nano", QUESTION)
    assert result.exit_code == 1 and result.stderr.startswith("Error: nano/bundle.json")


# --- the other commands


def test_inspect_shows_the_bundle() -> None:
    result = command("inspect", "nano", "--json")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((NANO / "bundle" / "bundle.json").read_text())
    assert json.loads(result.stdout)["components"] == manifest["components"]
    assert str(NANO / "bundle") in command("inspect", "nano").stdout.replace("\n", "")
    Path("nano").mkdir()
    assert command("inspect", "nano").exit_code == 1


def test_verify_checks_the_bundle() -> None:
    result = command("verify", "nano", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    files = [p for p in (NANO / "bundle").rglob("*") if p.is_file() and p.name != "bundle.json"]
    assert report["passed"] and report["bundle"] == "nano" and report["bytes"] == sum(p.stat().st_size for p in files)
    shutil.copytree(NANO / "bundle", "nano")
    (Path("nano") / "tokenizer.json").write_bytes(b"")
    assert command("verify", "nano").exit_code == 1


def test_profile_measures_the_bundle_under_its_name() -> None:
    bounds = ("--turns", 1, "--warmup", 0, "--seconds", 1, "--forced-frames", 4, "--threads", 1)
    result = command("profile", "nano", *bounds, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)["bundle"]
    assert (facts["name"], facts["kind"]) == ("nano", "bundle") and facts["mb"] > 1
