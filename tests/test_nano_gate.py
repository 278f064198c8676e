"""The gate's quality half on a model that has learned something: one layer with wrong scales is refused by it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeomni.data.readers import read_data
from edgeomni.data.synth import synthesize
from edgeomni.evaluate.lost import JudgeData
from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.gate.run import judged
from edgeomni.model import checkpoints


@pytest.fixture(scope="module")
def nano() -> Any:
    return checkpoints.load("nano")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> GateOptions:
    """Written questions in held-out wordings, answered in text and aloud."""
    folder = synthesize("nano", tmp_path_factory.mktemp("gate") / "data", samples=8)
    samples = read_data(folder / "test.jsonl").samples
    questions = JudgeData(samples, tasks=["tt", "ta"]).questions(16000)
    assert len(questions) == 12
    return GateOptions(enforce=False, questions=questions)


def quality(original: Any, exported: Any, options: GateOptions, folder: Path, precision: str) -> dict[str, bool]:
    """Quality figures of `exported`, judged against `original`: whether each passes."""
    bundle = export_bundle(exported, folder, precision=precision, gate=GateOptions(enforce=False))
    report = judged(original, bundle, options, 1, lambda _: None)
    return {figure.name: figure not in report.missed for figure in report.figures if figure.part == "quality"}


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "layer", ["layers.0.self_attn.v_proj", "layers.2.mlp.down_proj", "layers.4.mlp.up_proj"], ids=lambda name: name[7:]
)
def test_one_layer_with_wrong_scales_is_refused(
    nano: Any, options: GateOptions, layer: str, precision: str, tmp_path: Path
) -> None:
    """Scales taken for half of what they are: its weights are read as twice what they were."""
    broken = copy.deepcopy(nano)
    with torch.no_grad():
        broken.get_parameter(f"body.{layer}.weight").mul_(2)
    found = quality(nano, broken, options, tmp_path / "broken", precision)
    assert not found["answers.kl"], found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_an_honest_export_passes(nano: Any, options: GateOptions, precision: str, tmp_path: Path) -> None:
    found = quality(nano, nano, options, tmp_path / "honest", precision)
    assert len(found) == 6 and all(found.values()), found
