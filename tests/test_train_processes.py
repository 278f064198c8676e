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

from edgeomni.errors import TrainError
from edgeomni.train import fit
from edgeomni.train.config_file import to_toml


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


def together(*command: object) -> str:
    """Runs `command` (what follows "python") in two processes; returns what they said on stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def written(config: Any, path: Path) -> Path:
    path.write_text(to_toml(config))
    return path


def test_two_processes_equal_one_with_accumulation(place: Path) -> None:
    from edgeomni.model import checkpoints

    schedule = {"schedule": "cosine", "warmup": 0.25, "weight_decay": 0.1, "batch": 2, "steps": 6}
    ours = {"run": {"validate_every": 2, "save_every": 2, "log_every": 2, "keep": 2}}
    two = place / "two"
    path = written(config_of(place, optimizer=schedule, **ours), place / "two.toml")
    said = together("-m", "edgeomni", "train", path, "-o", two)
    assert said.count("What this run teaches") == said.count("two/checkpoint: written") == 1, said
    one = place / "one"
    config = config_of(place, optimizer={**schedule, "accumulate": 2}, **ours)
    fit(checkpoints.load(place / "ckpt"), None, config, one)
    a, b = figures_in(one), figures_in(two)
    assert [line["step"] for line in a] == [2, 2, 4, 4, 6, 6]
    assert [line.keys() for line in a] == [line.keys() for line in b]
    assert_same_lines(a, b)
    assert_close(one / "checkpoint", two / "checkpoint")
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert sorted(p.name for p in (two / "states").iterdir()) == sorted(p.name for p in (one / "states").iterdir())


ON_CPUS = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer
from edgeomni.cli import main
made = Trainer.create_accelerator_and_postprocess
def create(trainer):
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made(trainer)
Trainer.create_accelerator_and_postprocess = create
main(["train", sys.argv[1], "-o", sys.argv[2], "--set", "optimizer.steps=4"], standalone_mode=False)
main(["train", sys.argv[1], "-o", sys.argv[2], "--resume"], standalone_mode=False)
"""
"""accelerate leaves FSDP out on CPUs, which can do it all the same, so it is told that they are GPUs. The run is
interrupted after four steps, and goes on."""


def test_weights_spread_over_two_processes_learn_the_same_also_after_a_resume(place: Path) -> None:
    from edgeomni.model import checkpoints

    (place / "on_cpus.py").write_text(ON_CPUS)
    ours = {"run": {"validate_every": 2, "fsdp": "full_shard auto_wrap"}}
    two, one = place / "spread", place / "whole"
    together(place / "on_cpus.py", written(config_of(place, **ours), place / "spread.toml"), two)
    alone = config_of(place, optimizer={"accumulate": 2}, run={"validate_every": 2})
    fit(checkpoints.load(place / "ckpt"), None, alone, one)
    assert_same_lines(figures_in(one), figures_in(two))
    assert_close(one / "checkpoint", two / "checkpoint")


def test_fsdp_is_refused_where_it_would_be_left_out(place: Path) -> None:
    config = config_of(place, run={"fsdp": "full_shard auto_wrap"})
    with pytest.raises(TrainError, match="run.fsdp is for several GPUs"):
        fit(small_model(), None, config)


def assert_same_lines(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for left, right in zip(a, b, strict=True):
        norms = left.pop("grad_norm", 0.0), right.pop("grad_norm", 0.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert left == pytest.approx(right, abs=1e-5, rel=0)


def assert_close(a: Path, b: Path) -> None:
    left, right, start = (load_file(p / "model.safetensors") for p in (a, b, a.parents[1] / "ckpt"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=0, atol=1e-5, err_msg=name)
    assert sum(not np.array_equal(value, start[name]) for name, value in left.items()) > 5
