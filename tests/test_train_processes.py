"""Two processes on this machine's CPU, as torchrun starts them, train what one process with accumulation trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from training import data_in, figures_in, small_config, small_model

from edgeomni.train import fit
from edgeomni.train.config import to_toml


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeomni.model import checkpoints

    root = tmp_path_factory.mktemp("processes")
    checkpoints.save(small_model(), root / "ckpt")
    data_in(root / "data", 6)
    return root


def config_of(place: Path, **sections: Any) -> Any:
    """Without dropout, whose random numbers two processes draw on their own; with tasks that leave the adapter out."""
    return small_config(
        checkpoint=str(place / "ckpt"),
        data={"train": [str(place / "data" / "train.jsonl")], "validation_share": 0.3},
        peft={"dropout": 0.0},
        **sections,
    )


def together(place: Path, config: Any, name: str) -> Path:
    """Runs that configuration with two processes; returns the run's folder."""
    path = place / f"{name}.toml"
    path.write_text(to_toml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "edgeomni", "train", str(path), "-o", str(place / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("What this run teaches") == 1, done.stderr
    assert done.stderr.count(f"{name}/checkpoint: written") == 1, done.stderr
    return place / name


def test_two_processes_equal_one_with_accumulation(place: Path) -> None:
    from edgeomni.model import checkpoints

    schedule = {"schedule": "cosine", "warmup": 0.25, "weight_decay": 0.1, "batch": 2, "steps": 6}
    ours = {"run": {"validate_every": 2, "save_every": 2, "log_every": 2, "keep": 2}}
    two = together(place, config_of(place, optimizer=schedule, **ours), "two")
    one = place / "one"
    config = config_of(place, optimizer={**schedule, "accumulate": 2}, **ours)
    fit(checkpoints.load(place / "ckpt"), None, config, one)
    a, b = figures_in(one), figures_in(two)
    assert [line["step"] for line in a] == [2, 2, 4, 4, 6, 6]
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for left, right in zip(a, b, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    assert_close(one / "checkpoint", two / "checkpoint")
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert sorted(p.name for p in (two / "states").iterdir()) == sorted(p.name for p in (one / "states").iterdir())


def assert_close(a: Path, b: Path) -> None:
    left, right, start = (load_file(p / "model.safetensors") for p in (a, b, a.parents[1] / "ckpt"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=0, atol=1e-5, err_msg=name)
    assert sum(not np.array_equal(value, start[name]) for name, value in left.items()) > 5
