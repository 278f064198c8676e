"""The gate's quality half on a model that has learned something: one layer with wrong scales is refused by it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.gate.run import judged
from edgeomni.model import checkpoints

BLOCK = 32
LAYER = "body.layers.2.mlp.down_proj.weight"


def scales_of(weight: Tensor) -> Tensor:
    """The largest magnitude of every block of 32 inputs, [out, in]."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    return blocks.abs().amax(-1, keepdim=True).expand_as(blocks).reshape(weight.shape)


def rows_shifted(weight: Tensor) -> Tensor:
    """What is read where every row has the scales of its neighbour."""
    scales = scales_of(weight)
    return weight * scales.roll(1, 0) / scales


def blocks_shifted(weight: Tensor) -> Tensor:
    """What is read where every block has the scale of the block before."""
    scales = scales_of(weight)
    return weight * scales.roll(BLOCK, 1) / scales


def doubled(weight: Tensor) -> Tensor:
    """What is read where scales are taken for half of what they are."""
    return weight * 2


def quality(original: Any, exported: Any, folder: Path, precision: str) -> dict[str, bool]:
    """Quality figures of `exported`, judged against `original`: whether each passes."""
    bundle = export_bundle(exported, folder, precision=precision, gate=GateOptions(enforce=False))
    report = judged(original, bundle, GateOptions(enforce=False), 1, lambda _: None)
    return {figure.name: figure not in report.missed for figure in report.figures if figure.part == "quality"}


@pytest.fixture(scope="module")
def nano() -> Any:
    return checkpoints.load("nano")


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("damage", [rows_shifted, blocks_shifted, doubled])
def test_one_layer_with_wrong_scales_is_refused(
    nano: Any, damage: Callable[[Tensor], Tensor], precision: str, tmp_path: Path
) -> None:
    broken = copy.deepcopy(nano)
    with torch.no_grad():
        weight = broken.get_parameter(LAYER)
        weight.copy_(damage(weight))
    found = quality(nano, broken, tmp_path / "broken", precision)
    assert not found["llm.kl"] or not found["llm.top1"], found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_an_honest_export_passes(nano: Any, precision: str, tmp_path: Path) -> None:
    found = quality(nano, nano, tmp_path / "honest", precision)
    assert len(found) == 4 and all(found.values()), found
