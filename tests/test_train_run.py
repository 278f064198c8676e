"""Sixty synthesized questions, three stages, each from the checkpoint of the one before; then a bundle that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import figures_in, small_config, small_model, weights_in

from edgeomni import Session
from edgeomni.data.readers import read_data
from edgeomni.data.synth import synthesize
from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.model import checkpoints
from edgeomni.spec import EncoderSpec
from edgeomni.train import TrainConfig, fit
from edgeomni.train.config_file import read_config
from edgeomni.turn import TurnEnd

RECIPE = """
title = "numbers"
[lists]
number = ["zero", "one", "two", "three", "four", "five"]
[question_voice]
voices = ["{language}", "{language}+f2", "{language}+m3"]
unseen = ["{language}+m3"]
[[topics]]
name = "sum"
each = { a = "number", b = "number" }
where = "a + b <= 5"
then = { c = "number[a + b]" }
questions = ["what is {a} plus {b}"]
answer = "{c}"
[splits.train]
samples = 60
[splits.test]
samples = 4
new = ["voices"]
"""
FILES = {"config.toml", "log.jsonl", "curves.png", "states", "checkpoint", "data.json"}
LONGER = {"steps": 20, "batch": 8, "lr": 5e-3}
UNTRAINED = {
    "1": "LLM, text rows, special tokens",
    "2": "text rows",
    "3": "text rows",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage -> its run's folder. Audio is new, the encoder and the text rows are as they came."""
    from edgeomni.model import encoders

    root = tmp_path_factory.mktemp("stages")
    (root / "numbers.toml").write_text(RECIPE)
    data = synthesize(root / "numbers.toml", root / "data", language="en-us") / "train.jsonl"
    encoder = EncoderSpec(layers=1, width=32, heads=2, ffn=64, context=150)
    model = small_model(encoder=encoder, front_end=encoders.front_end(encoder, 40))
    model.provenance["untrained"] = "adapter, LLM, text rows, special tokens, audio rows"
    before, made = checkpoints.save(model, root / "ckpt"), {}
    for stage in ("1", "2", "3"):
        made[stage] = root / f"run{stage}"
        fit(checkpoints.load(before), None, config_of(before, data, stage), made[stage])
        before = made[stage] / "checkpoint"
    return made


def config_of(checkpoint: Path, data: Path, stage: Any) -> TrainConfig:
    text = {"text": [str(data.with_name("test.jsonl"))]} if stage == "2" else {}
    found: TrainConfig = small_config(
        stage=stage,
        checkpoint=str(checkpoint),
        data={"train": [str(data)], "validation_share": 0.1, **text},
        optimizer={"steps": 12, "batch": 6, "lr": 3e-3},
        run={"log_every": 2, "save_every": 6, "keep": 1},
    )
    return found


def test_sixty_samples_serve_every_task(runs: dict[str, Path]) -> None:
    samples = read_data(runs["1"].parent / "data" / "train.jsonl").samples
    assert len(samples) == 60
    assert {sample.tasks() for sample in samples} == {("asr", "at", "aa", "tt", "ta")}


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_losses_fall_on_what_was_learned_and_on_what_was_held_out(runs: dict[str, Path], stage: str) -> None:
    lines = figures_in(runs[stage])
    losses = [line["loss"] for line in lines if "loss" in line]
    held = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert np.mean(losses[-2:]) < 0.95 * losses[0]
    assert len(held) == 2 and held[1] < held[0]


def test_each_stage_teaches_its_own_tasks(runs: dict[str, Path]) -> None:
    """As Mini-Omni has them (arXiv 2408.16725, section 3.3)."""
    expected = {"1": {"asr", "ta"}, "2": {"tt", "at"}, "3": {"aa", "at", "ta", "tt"}}
    for stage, tasks in expected.items():
        keys = {key for line in figures_in(runs[stage]) for key in line}
        assert {t for t in ("asr", "tt", "at", "ta", "aa") if f"loss_{t}" in keys} == tasks


def test_what_each_stage_leaves_untrained(runs: dict[str, Path]) -> None:
    trained_in = []
    for stage, untrained in UNTRAINED.items():
        trained_in.append(stage)
        provenance = checkpoints.load(runs[stage] / "checkpoint").provenance
        assert provenance["untrained"] == untrained
        assert provenance["trained_in"] == ", ".join(trained_in)
        before = runs["1"].parent / "ckpt" if stage == "1" else runs[str(int(stage) - 1)] / "checkpoint"
        assert provenance["trained_from"] == checkpoints.load(before).provenance["source_hash"]


def test_a_run_holds_all_its_files(runs: dict[str, Path]) -> None:
    assert {p.name for p in runs["1"].iterdir()} == FILES
    assert {p.name for p in runs["2"].iterdir()} == FILES | {"adapter", "evaluation.json"}
    assert {p.name for p in runs["3"].iterdir()} == FILES | {"adapter"}
    assert (runs["1"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    ability = json.loads((runs["2"] / "evaluation.json").read_text())
    assert set(ability) == {"before", "after"} and ability["after"]["samples"] == 4
    assert {p.name for p in (runs["3"] / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


def test_the_configuration_of_a_run_repeats_it(runs: dict[str, Path], tmp_path: Path) -> None:
    config = read_config(runs["2"] / "config.toml")
    fit(checkpoints.load(config.checkpoint), None, config, tmp_path / "again")
    assert figures_in(tmp_path / "again") == figures_in(runs["2"])
    assert weights_in(tmp_path / "again" / "checkpoint") == weights_in(runs["2"] / "checkpoint")
    assert (tmp_path / "again" / "config.toml").read_bytes() == (runs["2"] / "config.toml").read_bytes()


def test_the_last_checkpoint_exports_and_answers(runs: dict[str, Path], tmp_path: Path) -> None:
    bundle = export_bundle(runs["3"], tmp_path / "bundle", precision="int8", threads=1, gate=GateOptions())
    assert bundle.manifest.gate["passed"] is True
    assert bundle.manifest.provenance["untrained"] == "text rows"
    sample = read_data(runs["1"].parent / "data" / "train.jsonl").samples[0]
    with Session.open(bundle, threads=1) as session:
        *_, end = session.respond("ta", text=sample.text, max_length=60)
    assert isinstance(end, TurnEnd) and end.tokens.shape[1] > 0


def test_an_encoder_learns_by_ctc_and_a_second_run_goes_on_with_its_head(runs: dict[str, Path], tmp_path: Path) -> None:
    """The second run, of stage 3 with LoRA, hears with the encoder and spells with the head of the first."""
    from edgeomni.train.ctc import CtcHead

    base, data = runs["1"].parent / "ckpt", runs["1"].parent / "data" / "train.jsonl"
    first = small_config(stage="ctc", data={"train": [str(data)]}, loss={"ctc_units": "words"}, optimizer=LONGER)
    fit(checkpoints.load(base), None, first, tmp_path / "ctc")
    losses = [line["loss_ctc"] for line in figures_in(tmp_path / "ctc")]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    head = CtcHead.load(tmp_path / "ctc" / "ctc.safetensors", 32)
    assert set(head.vocabulary.entries) == {"what", "is", "plus", "zero", "one", "two", "three", "four", "five"}
    before, after = weights_in(base), weights_in(tmp_path / "ctc" / "checkpoint")
    moved = {name for name in after if after[name] != before[name]}
    assert moved and all(name.startswith("encoder.") for name in moved)
    loss = {"ctc": 0.5, "ctc_head": str(tmp_path / "ctc" / "ctc.safetensors")}
    second = small_config(data={"train": [str(data)]}, loss=loss, optimizer={"steps": 2}, learn={"encoder": "lora"})
    fit(checkpoints.load(tmp_path / "ctc" / "checkpoint"), None, second, tmp_path / "second")
    assert figures_in(tmp_path / "second")[0]["loss_ctc"] < 0.8 * losses[0]
    taught = CtcHead.load(tmp_path / "second" / "ctc.safetensors", 32)
    assert taught.vocabulary == head.vocabulary
    assert any(
        not np.array_equal(a.numpy(), b.numpy())
        for a, b in zip(taught.state_dict().values(), head.state_dict().values(), strict=True)
    )
