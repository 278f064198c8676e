"""Configurations of runs: read, changed, filled in, written and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeomni.chat import ChatSpec
from edgeomni.errors import TrainError, UsageError
from edgeomni.train.augment import AugmentConfig
from edgeomni.train.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    resolved,
    stage_tasks,
)
from edgeomni.train.config_file import differences, from_changes, read_config, to_toml
from edgeomni.train.stages import modes_of


def document(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_a_document_is_read_with_its_paths_beside_it(tmp_path: Path) -> None:
    text = """
        checkpoint = "ckpt"
        stage = 2
        [data]
        train = ["a.jsonl", "/b.jsonl"]
        [loss]
        ctc_head = "head.safetensors"
        [augment]
        noise_folder = "noise"
        speed = [0.8, 1.2]
        [chat]
        default_system = "Translate."
        stop_words = ["<|im_end|>"]
    """
    found = read_config(document(tmp_path, text))
    assert found.stage == "2" and found.checkpoint == str(tmp_path / "ckpt")
    assert found.data.train == [str(tmp_path / "a.jsonl"), "/b.jsonl"]
    assert found.loss.ctc_head == str(tmp_path / "head.safetensors")
    assert found.augment.noise_folder == str(tmp_path / "noise") and found.augment.speed == (0.8, 1.2)
    assert found.chat == ChatSpec(default_system="Translate.", stop_words=("<|im_end|>",))


def test_changes_win_and_are_taken_as_toml_or_as_text(tmp_path: Path) -> None:
    path = document(tmp_path, 'stage = "1"\n[optimizer]\nlr = 0.1\n')
    found = read_config(
        path,
        ["optimizer.lr=2e-4", "run.precision=bf16", "lora=false", 'data.train=["x"]', "tasks.asr=2", "init=sft"],
    )
    assert found.optimizer.lr == 2e-4 and found.run.precision == "bf16" and found.lora is False
    assert found.data.train == ["x"] and found.tasks == {"asr": 2.0} and found.init == "sft"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage = '4'", r"config\.toml: \$\.stage"),
        ("[optimizer]\nlearning_rate = 1", r"unknown key\(s\) \$\.optimizer\.learning_rate"),
        ("[optimizer]\nsteps = 0", "optimizer.steps is 0, and must be a number from 1 up"),
        ("[optimizer]\nlr = -1.0", "optimizer.lr is -1.0"),
        ("[optimizer]\nsteps = 'many'", r"\$\.optimizer\.steps"),
        ("[tasks]\nsing = 1", r"unknown task\(s\) sing; known are asr"),
        ("[tasks]\nasr = 0", "all weights are 0"),
        ("[tasks]\nasr = -1", "tasks.asr is -1"),
        ("[learn]\nadapter = 'lora'", "learn.adapter cannot be lora, which is for body, encoder, tts"),
        ("[run]\nlog_every = 7", "run.save_every 200 must be a multiple of run.log_every 7"),
        ("[run]\nvalidate_every = 150", "run.validate_every 150 must divide run.save_every 200"),
        ("[data]\nvalidation_share = 1.0", "data.validation_share is 1.0"),
        ("[augment]\nspeed = [1.2, 0.8]", "augment.speed"),
        ("[chat]\nsystem_format = 'x'", "chat.system_format"),
        ("[peft]\nrank = 0", "peft.rank is 0"),
        ("[optimizer]\nwarmup = 1.5", "optimizer.warmup is 1.5, and is a share of the steps"),
        ("stage = ", "not valid TOML"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        read_config(document(tmp_path, text))


@pytest.mark.parametrize("change", ["optimizer.lr", "=5", ".lr=1", "stage.x=1"])
def test_a_change_that_is_none_is_a_usage_error(tmp_path: Path, change: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        read_config(document(tmp_path, 'stage = "1"\n'), [change])


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = TrainConfig(
        stage="end-to-end",
        checkpoint='with "quotes" and ü',
        init="sft",
        lora=False,
        seed=7,
        tasks={"asr": 0.5, "aa": 2.0},
        data=DataConfig(train=["a", "b"], validation_share=0.1, format="native"),
        optimizer=OptimizerConfig(steps=5, lr=1e-7, max_frames=900),
        loss=LossConfig(ctc=0.3, ctc_units="words", ctc_head="h"),
        augment=AugmentConfig(speed_chance=0.5),
        run=RunConfig(precision="fp16", log_every=5, save_every=50, validate_every=25, patience=3),
        chat=ChatSpec(default_system="line\nbreak", stop_words=("a", "b")),
    )
    assert read_config(document(tmp_path, to_toml(config)), anchored=False) == config
    full = resolved(config, modes_of(config))
    assert read_config(document(tmp_path, to_toml(full)), anchored=False) == full
    assert resolved(full, modes_of(full)) == full


@pytest.mark.parametrize(
    ("changes", "rate", "warmup"),
    [
        ({"stage": "1"}, 1e-3, 0.03),
        ({"stage": "2"}, 2e-4, 0.03),
        ({"stage": "3"}, 2e-4, 0.03),
        ({"stage": "2", "lora": False}, 1e-4, 0.03),
        ({"stage": "3", "init": "sft"}, 5e-5, 0.1),
        ({"stage": "3", "optimizer": OptimizerConfig(lr=0.5, warmup=0.0)}, 0.5, 0.0),
        ({"stage": "3", "optimizer": OptimizerConfig(lr=0.0)}, 0.0, 0.03),
    ],
)
def test_the_learning_rate_follows_from_stage_and_start(changes: dict[str, Any], rate: float, warmup: float) -> None:
    config = TrainConfig(**changes)
    found = resolved(config, modes_of(config)).optimizer
    assert found.lr == pytest.approx(rate) and found.warmup == warmup


def test_the_tasks_of_each_stage_are_the_papers() -> None:
    wanted = {
        "1": {"asr", "ta"},
        "2": {"tt", "at"},
        "3": {"aa", "at", "ta", "tt"},
        "end-to-end": {"asr", "at", "aa", "tt", "ta"},
        "ctc": {"asr"},
    }
    for stage, tasks in wanted.items():
        assert stage_tasks(TrainConfig(stage=stage)) == dict.fromkeys(tasks, 1.0)  # type: ignore[arg-type]
    assert stage_tasks(TrainConfig(stage="1", tasks={"aa": 3.0})) == {"aa": 3.0}


def test_after_sft_a_fifth_of_the_mix_is_text_at_least() -> None:
    first = stage_tasks(TrainConfig(stage="1", init="sft"))
    assert first["tt"] / sum(first.values()) == pytest.approx(0.2)
    second = stage_tasks(TrainConfig(stage="2", init="sft"))
    assert second == {"tt": 1.0, "at": 1.0}
    assert stage_tasks(TrainConfig(stage="ctc", init="sft")) == {"asr": 1.0}


def test_the_ctc_stage_has_its_loss() -> None:
    config = TrainConfig(stage="ctc")
    assert resolved(config, modes_of(config)).loss == LossConfig(text=0.0, audio=0.0, ctc=1.0)
    given = TrainConfig(stage="ctc", loss=LossConfig(ctc=0.2, text=3.0))
    assert resolved(given, modes_of(given)).loss == LossConfig(text=0.0, audio=0.0, ctc=0.2)


def test_differences_are_named_by_their_path() -> None:
    one = TrainConfig()
    other = replace(one, seed=1, optimizer=replace(one.optimizer, batch=3), tasks={"tt": 1.0})
    assert differences(one, other) == {"seed": (0, 1), "tasks": ({}, {"tt": 1.0}), "optimizer.batch": (8, 3)}
    assert differences(one, one) == {}


def test_changes_alone_make_a_configuration() -> None:
    assert from_changes({"checkpoint": "c"}, ["stage=1", 'data.train=["d"]']) == TrainConfig(
        stage="1", checkpoint="c", data=DataConfig(train=["d"])
    )
