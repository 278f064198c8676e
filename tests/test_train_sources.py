"""The folder of a run stands for its checkpoint wherever one is asked for, and is merged where that is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import Golden
from training import samples_in, small_model

from edgeomni.cli import main
from edgeomni.errors import CheckpointError
from edgeomni.export import export_bundle
from edgeomni.model import checkpoints
from edgeomni.sampling import Sampling
from edgeomni.session import Session, TurnEnd
from edgeomni.train import TrainConfig, fit
from edgeomni.train.codes import codec_frames
from edgeomni.train.config import OptimizerConfig, RunConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    base = checkpoints.save(small_model(), folder / "base")
    config = TrainConfig(stage="3", checkpoint=str(base), optimizer=OptimizerConfig(steps=2, batch=4, lr=0.01))
    fit(checkpoints.load(base), samples_in(folder / "data"), config, folder / "run")
    return folder / "run"


def answer(source: Path) -> list[int]:
    with Session.open(source) as session:
        end = list(session.respond("tt", text="one plus two", sampling=Sampling(greedy=True), max_length=20))[-1]
    assert isinstance(end, TurnEnd)
    return [int(token) for token in end.tokens[-1]]


def test_a_run_loads_and_answers_as_its_checkpoint(run: Path) -> None:
    assert checkpoints.kind_of(run) == "run"
    ours, theirs = checkpoints.load(run), checkpoints.load(run / "checkpoint")
    assert all(torch.equal(ours.state_dict()[name], t) for name, t in theirs.state_dict().items())
    assert answer(run) == answer(run / "checkpoint")


def test_inspect_shows_the_checkpoint_of_a_run(run: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(run), "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["kind"] == "edgeomni" and shown["provenance"]["trained_in"] == "3"


def test_export_takes_a_run_and_merges_where_only_the_adapter_was_kept(run: Path, tmp_path: Path) -> None:
    whole = export_bundle(run, tmp_path / "whole", precision="fp32")
    kept = shutil.copytree(run, tmp_path / "kept")
    shutil.rmtree(kept / "checkpoint")
    merged = export_bundle(kept, tmp_path / "merged", precision="fp32")
    assert answer(tmp_path / "whole") == answer(tmp_path / "merged") == answer(run)
    sizes = [{f.path: f.size for c in b.manifest.components.values() for f in c.files} for b in (whole, merged)]
    assert sizes[0] == sizes[1]


def test_the_released_layout_trains_and_keeps_its_tensors_names(golden: Golden, tmp_path: Path) -> None:
    """From the published files, with the TTS adapter and the joint table as they are there."""
    codes = np.random.default_rng(0).integers(0, 64, (9, 7))
    samples = samples_in(tmp_path, text="w1 w2", answer="w3 w4", answer_codes=codes)
    config = TrainConfig(
        stage="3", checkpoint=str(golden.path), optimizer=OptimizerConfig(steps=2, batch=4), run=RunConfig(log_every=1)
    )
    before = checkpoints.load(golden.path)
    with pytest.raises(CheckpointError, match="the codec of this checkpoint does not encode"):  # of golden/ alone
        codec_frames(before.codec, before.spec.codec, np.zeros(5000, np.float32))
    trained = fit(checkpoints.load(golden.path), samples, config, tmp_path / "run")
    assert len(trained.log) == 2
    found = checkpoints.load(tmp_path / "run")
    assert list(found.state_dict()) == list(before.state_dict()) and found.spec.layout == before.spec.layout
    layout = before.spec.layout
    words, audio = slice(0, layout.eot), slice(layout.text_vocab, None)
    assert torch.equal(found.embedding.weight[words], before.embedding.weight[words])
    assert not torch.equal(found.embedding.weight[audio], before.embedding.weight[audio])


def test_a_run_that_has_not_finished_is_told(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (begun / "states").mkdir(parents=True)
    shutil.copy(run / "config.toml", begun)
    result = CliRunner().invoke(main, ["export", str(begun), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "has no checkpoint yet" in result.output and "--resume" in result.output
