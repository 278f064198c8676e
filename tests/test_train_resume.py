"""A run that was interrupted goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training import data_in, figures_in, small_config, small_model, weights_in

from edgeomni.errors import EdgeOmniError, TrainError, UsageError
from edgeomni.train import fit
from edgeomni.train.config_file import to_toml

AUGMENT = {"speed_chance": 0.5, "noise_chance": 0.5, "volume_chance": 0.5, "mel_chance": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpt/, data/train.jsonl and run/, an uninterrupted run; not to be changed."""
    from edgeomni.model import checkpoints

    root = tmp_path_factory.mktemp("resume")
    checkpoints.save(small_model(), root / "ckpt")
    data_in(root / "data", 5)
    train(root, root / "run")
    return root


def config_of(place: Path, /, **sections: Any) -> Any:
    data = {"train": [str(place / "data" / "train.jsonl")], **sections.pop("data", {})}
    return small_config(checkpoint=str(place / "ckpt"), data=data, augment=AUGMENT, **sections)


def train(place: Path, out: Path, /, *, resume: bool = False, **sections: Any) -> Any:
    from edgeomni.model import checkpoints

    return fit(checkpoints.load(place / "ckpt"), None, config_of(place, **sections), out, resume=resume)


def interrupted(run: Path, copy: Path, step: int) -> Path:
    """`run` as it was when it had gone a little beyond the state of `step`."""
    shutil.copytree(run, copy)
    for state in (copy / "states").iterdir():
        if int(state.name.rpartition("-")[2]) > step:
            shutil.rmtree(state)
    for name in ("checkpoint", "adapter"):
        shutil.rmtree(copy / name)
    (copy / "curves.png").unlink()
    lines = (copy / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step + 1]
    (copy / "log.jsonl").write_text("".join(kept) + '{"step": 9, "lo')
    return copy


def assert_same(a: Path, b: Path) -> None:
    assert figures_in(a) == figures_in(b)
    assert weights_in(a / "checkpoint") == weights_in(b / "checkpoint")


def test_a_killed_run_goes_on_to_the_last_digit(place: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 8
    (tmp_path / "config.toml").write_text(to_toml(config_of(place)))
    command = [sys.executable, "-m", "edgeomni", "train", str(tmp_path / "config.toml"), "-o", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        while not (run / "states" / "checkpoint-4" / "complete").exists():
            assert child.poll() is None, child.communicate()
            time.sleep(0.002)
        child.kill()
    assert not (run / "checkpoint").exists()
    assert (run / "log.jsonl").read_text().count("\n") < steps
    train(place, run, resume=True)
    assert_same(run, place / "run")
    assert [line["step"] for line in figures_in(run)] == list(range(1, steps + 1))


def test_a_state_that_was_cut_off_is_passed_over_and_removed(place: Path, tmp_path: Path) -> None:
    run = interrupted(place / "run", tmp_path / "run", 6)
    cut = run / "states" / "checkpoint-6"
    (cut / "complete").unlink()
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    stale = run / "states" / "checkpoint-99"
    shutil.copytree(cut, stale)
    train(place, run, resume=True, run={"keep": 1})
    assert_same(run, place / "run")
    assert [state.name for state in (run / "states").iterdir()] == ["checkpoint-8"]


def test_a_run_killed_before_its_first_state_begins_again(place: Path, tmp_path: Path) -> None:
    run = interrupted(place / "run", tmp_path / "run", 0)
    train(place, run, resume=True)
    assert_same(run, place / "run")


def test_a_finished_run_goes_on_with_more_steps(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    trained = train(place, run, resume=True)
    assert_same(run, place / "run")
    assert trained.log[-1]["step"] == 8
    train(place, run, resume=True, optimizer={"steps": 11})
    train(place, tmp_path / "at once", optimizer={"steps": 11})
    assert_same(run, tmp_path / "at once")


def test_another_learning_rate_and_schedule_length_take_effect(place: Path, tmp_path: Path) -> None:
    run = interrupted(place / "run", tmp_path / "run", 4)
    changed = {"lr": 1e-4, "steps": 9}
    train(place, run, resume=True, optimizer=changed)
    rates = [line["learning_rate"] for line in figures_in(run)]
    assert rates == [2e-3] * 4 + [1e-4] * 5


def test_patience_counts_validations_from_before_the_interruption(place: Path, tmp_path: Path) -> None:
    """A rate this high makes the validation worse from some step on, and the run ends before its time."""
    run = {"validate_every": 1, "save_every": 1, "patience": 3}
    worse: dict[str, Any] = {"optimizer": {"lr": 0.5, "steps": 40}, "run": run}
    train(place, tmp_path / "run", data={"validation_share": 0.4}, **worse)
    last = figures_in(tmp_path / "run")[-1]["step"]
    assert last < 40
    copy = interrupted(tmp_path / "run", tmp_path / "copy", last - 1)
    train(place, copy, resume=True, data={"validation_share": 0.4}, **worse)
    assert_same(copy, tmp_path / "run")


def test_what_cannot_be_resumed(place: Path, tmp_path: Path) -> None:
    run = interrupted(place / "run", tmp_path / "run", 4)
    before = weights_and_log(run)
    with pytest.raises(UsageError, match=r"another configuration: seed was 0 and is 1"):
        train(place, run, resume=True, seed=1)
    with pytest.raises(UsageError, match="peft.rank was 4 and is 8$"):
        train(place, run, resume=True, peft={"rank": 8})
    with pytest.raises(UsageError, match="is no run"):
        train(place, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(UsageError, match="exists; choose another folder, or go on with it: --resume"):
        train(place, run)
    assert weights_and_log(run) == before


def weights_and_log(run: Path) -> tuple[bytes, bytes]:
    return (run / "states" / "checkpoint-4" / "model.safetensors").read_bytes(), (run / "log.jsonl").read_bytes()


def test_other_data_under_the_same_name_is_refused(place: Path, tmp_path: Path) -> None:
    run = interrupted(place / "run", tmp_path / "run", 4)
    data = place / "data" / "train.jsonl"
    before = data.read_text()
    try:
        data.write_text(before.replace('"one plus"', '"one is"'))
        with pytest.raises(TrainError, match="the data has changed since the run began"):
            train(place, run, resume=True)
    finally:
        data.write_text(before)
    train(place, run, resume=True)
    assert_same(run, place / "run")


def test_a_state_of_another_layout_is_refused(place: Path, tmp_path: Path) -> None:
    from edgeomni.spec import BodySpec

    run = interrupted(place / "run", tmp_path / "run", 4)
    other = small_model(body=BodySpec("qwen2", 1, 64, 4, 2, head_dim=16, ffn=96, rope_theta=1e4, qkv_bias=True))
    with pytest.raises(TrainError, match="checkpoint-4.*does not fit this run"):
        fit(other, None, config_of(place), run, resume=True)
    damaged = run / "states" / "checkpoint-4" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(EdgeOmniError, match="checkpoint-4.*cannot be read.*remove this state"):
        train(place, run, resume=True)
    shutil.rmtree(damaged.parent)
    train(place, run, resume=True)
    assert_same(run, place / "run")
