"""The checkpoint of a shipped model, by name: loaded, run on torch, exported, copied, evaluated, trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import edgeomni
from edgeomni import Session, load
from edgeomni.cli import main
from edgeomni.errors import CheckpointError
from edgeomni.export import STEPS, export_bundle
from edgeomni.model import checkpoints
from edgeomni.profiling.measure import Job, measure
from edgeomni.train.codec_files import read_codec
from edgeomni.train.config_file import absolute, from_changes, read_config

NANO = Path(edgeomni.__file__).resolve().parent / "nano"


class Enough(Exception):
    """Ends an export that has shown what it was to show."""


def command(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with nothing in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_it_loads_by_name() -> None:
    assert checkpoints.kind_of("nano") == "edgeomni"
    named, there = checkpoints.load("nano"), checkpoints.load(NANO / "checkpoint")
    assert named.provenance == there.provenance
    for name, tensor in there.state_dict().items():
        assert torch.equal(named.state_dict()[name], tensor), name


def test_a_local_folder_wins(tiny_dir: Path) -> None:
    Path("nano").mkdir()
    assert checkpoints.kind_of("nano") is None
    with pytest.raises(CheckpointError, match="^nano: no checkpoint layout"):
        checkpoints.load("nano")
    Path("nano").rmdir()
    shutil.copytree(tiny_dir, "nano")
    assert checkpoints.load("nano").spec == checkpoints.load(tiny_dir).spec
    assert Session.open("nano", threads=1).spec == checkpoints.load(tiny_dir).spec


def test_torch_runs_it() -> None:
    """What the torch engine answers is the checkpoint's answer; a bundle would have been refused."""
    with load("nano", engine="torch", threads=1) as session, load(NANO / "checkpoint", threads=1) as same:
        answers = [list(s.respond("tt", text="tell me", max_length=30))[-1] for s in (session, same)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)  # type: ignore[union-attr]


def test_profile_measures_it_on_torch_under_its_name() -> None:
    job = Job("nano", engine="torch", seconds=1.0, turns=1, warmup=0, forced_frames=2, threads=1)
    assert measure(job)["bundle"] == {"name": "nano", "kind": "checkpoint"}


def test_export_takes_it_and_may_write_a_folder_of_its_name() -> None:
    """Stopped before the gate, which other tests wait for: by then all components are written."""
    steps: list[str] = []

    def stop(step: str) -> None:
        steps.append(step)
        if step.startswith("gate"):
            raise Enough

    with pytest.raises(Enough):
        export_bundle("nano", "nano", precision="int8", threads=1, progress=stop)
    assert steps[0] == "load checkpoint" and "export codec (onnx:fp32)" in steps and len(steps) < STEPS
    assert list(Path().iterdir()) == []


def test_export_does_not_write_into_it() -> None:
    for out in (NANO / "checkpoint", NANO / "checkpoint" / "bundle"):
        result = command("export", "nano", "-o", out, "--force")
        assert result.exit_code == 2 and "lie in one another" in result.stderr


def test_init_copies_it() -> None:
    result = command("init", "--from", "nano", "--half", "-o", "copy")
    assert result.exit_code == 0, result.stderr
    assert (Path("copy") / "model.safetensors").read_bytes() == (NANO / "checkpoint" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("engine", [[], ["--engine", "torch"]])
def test_evaluate_judges_the_bundle_and_on_torch_the_checkpoint(engine: list[str]) -> None:
    samples = [{"text": "tell me what the dog can do", "answer": "the dog barks"}, {"text": "hello", "answer": "hello"}]
    Path("test.jsonl").write_text("".join(json.dumps({**s, "task": "tt"}) + "\n" for s in samples))
    path = NANO / ("checkpoint" if engine else "bundle")
    bounds = ("--data", "test.jsonl", "--max-length", 40, "--threads", 1, "--json")
    answers = {}
    for source in ("nano", str(path)):
        rows = Path(f"{Path(source).name}-rows.jsonl")
        result = command("evaluate", source, *bounds, *engine, "--rows", rows)
        assert result.exit_code == 0, result.stderr
        (found,) = json.loads(result.stdout)["sources"]
        assert found["source"] == source and found["tasks"]["tt"]["samples"] == len(samples)
        answers[source] = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    assert answers["nano"] == answers[str(path)] and all(answers["nano"])


def test_a_configuration_may_name_it(tmp_path: Path) -> None:
    """Where the file lies decides whether a local checkpoint of that name is meant; what is stored is its path."""
    config = tmp_path / "config.toml"
    config.write_text('checkpoint = "nano"\nstage = "1"\n[data]\ntrain = ["train.jsonl"]\n')
    assert absolute(read_config(config)).checkpoint == str(NANO / "checkpoint")
    (tmp_path / "nano").mkdir()
    assert read_config(config).checkpoint == str(tmp_path / "nano")
    given = {"checkpoint": "nano", "stage": "1", "data": {"train": ["train.jsonl"]}}
    assert absolute(from_changes(given)).checkpoint == str(NANO / "checkpoint")
    Path("nano").mkdir()
    assert absolute(from_changes(given)).checkpoint == str(tmp_path / "here" / "nano")


def test_the_codec_trainer_begins_with_its_codec() -> None:
    sizes, state = read_codec("nano")
    expected_sizes, expected = read_codec(str(NANO / "checkpoint"))
    assert sizes == expected_sizes and sorted(state) == sorted(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
