"""LoRA comes off again: merged and unmerged agree, the round trip of tied tables is exact, a wrong base is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from training import samples_in, small_model

from edgeomni.errors import CheckpointError, TrainError, UsageError
from edgeomni.model import checkpoints
from edgeomni.train import TrainConfig, fit, merge
from edgeomni.train.adapters import load_adapter, merged, prepared
from edgeomni.train.config import LearnConfig, LossConfig, OptimizerConfig, PeftConfig, RunConfig
from edgeomni.train.stages import modes_of
from edgeomni.train.tables import Tables
from edgeomni.train.trainable import TrainableOmni

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "TTS adapter": {"tts_layers": 1},
}


@dataclass(frozen=True)
class Run:
    """A finished run of stage 3 with LoRA, and the checkpoint that it began with."""

    base: Path
    run: Path


@pytest.fixture(scope="module", params=list(SHAPES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("merge")
    base = checkpoints.save(small_model(**SHAPES[request.param]), folder / "base")
    config = TrainConfig(
        stage="3",
        checkpoint=str(base),
        peft=PeftConfig(rank=4),
        optimizer=OptimizerConfig(steps=4, batch=4, lr=0.02),
        run=RunConfig(log_every=2, save_every=4),
    )
    fit(checkpoints.load(base), samples_in(folder / "data"), config, folder / "run")
    return Run(base, folder / "run")


def prompts(model: Any) -> torch.Tensor:
    """Ids of 2 x 20 frames, each within its stream's rows."""
    layout = model.spec.layout
    generator = torch.Generator().manual_seed(3)
    audio = [
        torch.randint(layout.audio_vocab, (2, 20), generator=generator) + layout.shift(k) for k in range(layout.streams)
    ]
    return torch.stack([*audio, torch.randint(layout.text_vocab, (2, 20), generator=generator)], dim=1)


def test_merged_and_unmerged_say_the_same(run: Run) -> None:
    base = checkpoints.load(run.base)
    unmerged = load_adapter(TrainableOmni(base, LossConfig()), run.run / "adapter").eval()
    trained = checkpoints.load(run.run / "checkpoint")
    ids = prompts(trained)
    with torch.no_grad():
        ours, theirs = unmerged.get_base_model().logits(ids), trained(ids)
        plain = checkpoints.load(run.base)(ids)
    for a, b, untrained in zip(ours, theirs, plain, strict=True):
        assert (a - b).abs().max() < 1e-4
        assert (a - untrained).abs().max() > 1e-2


def test_merging_the_run_or_its_adapter_gives_the_runs_checkpoint(run: Run, tmp_path: Path) -> None:
    merge(run.run, tmp_path / "a")
    merge(run.run / "adapter", tmp_path / "b", base=run.base)
    wanted = checkpoints.load(run.run / "checkpoint")
    for name in ("a", "b"):
        found = checkpoints.load(tmp_path / name)
        assert found.spec == wanted.spec and found.tokenizer_json == wanted.tokenizer_json
        for key, tensor in wanted.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], tensor, rtol=0, atol=1e-6)
        same = {k: v for k, v in wanted.provenance.items() if k != "source_hash"}
        assert {k: v for k, v in found.provenance.items() if k != "source_hash"} == same


def test_the_names_of_the_tensors_are_those_of_init(run: Run) -> None:
    assert list(checkpoints.load(run.run / "checkpoint").state_dict()) == list(checkpoints.load(run.base).state_dict())
    files = {p.name for p in (run.run / "checkpoint").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}


def test_an_adapter_of_another_base_is_refused_by_its_hash(run: Run, tmp_path: Path) -> None:
    other = checkpoints.save(small_model(seed=5), tmp_path / "other")
    with pytest.raises(TrainError, match="was trained on a checkpoint with the hash .* --base"):
        merge(run.run, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


def test_what_has_no_adapter_says_so(run: Run, tmp_path: Path) -> None:
    config = TrainConfig(stage="1", optimizer=OptimizerConfig(steps=1, batch=2))
    fit(small_model(), samples_in(tmp_path / "data"), config, tmp_path / "run")
    with pytest.raises(UsageError, match="stage 1 of this run learned without LoRA.*checkpoint is the trained"):
        merge(tmp_path / "run", tmp_path / "out")
    with pytest.raises(TrainError, match=r"edgeomni\.json: cannot be read"):
        merge(run.base, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        merge(run.run, tmp_path / "out", base=tmp_path / "nowhere")


def test_a_damaged_adapter_is_refused(run: Run, tmp_path: Path) -> None:
    adapter = shutil.copytree(run.run / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainError, match="adapter"):
        merge(adapter, tmp_path / "out", base=run.base)
    (adapter / "edgeomni.json").write_text(json.dumps({"base_hash": "x"}))
    with pytest.raises(TrainError, match="hash"):
        merge(adapter, tmp_path / "out", base=run.base)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_tables_taken_apart_and_joined_are_the_same_bits(shape: str) -> None:
    model = small_model(**SHAPES[shape])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = Tables(model)
    assert tables.audio.weight.data_ptr() == model.embedding.weight[model.spec.layout.text_vocab :].data_ptr()
    tables.join(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("part", ["encoder", "body", "tts"])
def test_a_part_that_learns_whole_beside_lora_is_what_computes(part: str, tmp_path: Path) -> None:
    """peft trains a copy of it. The copy has to be what the loss goes through, and what is kept."""
    model = small_model(tts_layers=1)
    lora = "encoder" if part == "body" else "body"
    learn: dict[str, Any] = {part: "train", lora: "lora"}
    modes = modes_of(TrainConfig(stage="3", learn=LearnConfig(**learn)))
    wrapped = prepared(TrainableOmni(model, LossConfig()), modes, PeftConfig(rank=2))
    layer = {"encoder": "layers.0.fc1", "body": "layers.0.mlp.up_proj", "tts": "layers.0.mlp.up_proj"}[part]
    kept = f"{part}.modules_to_save.default.{layer}.weight"
    copies = [p for name, p in wrapped.named_parameters() if name.endswith(kept)]
    assert len(copies) == 1 and copies[0].requires_grad
    ids = prompts(model)
    mel = torch.zeros(1, 40, 100)
    group = {"mel": mel, "row": torch.tensor([0]), "start": torch.tensor([1]), "count": torch.tensor([5])}
    before = wrapped.get_base_model().logits(ids, [group])
    with torch.no_grad():
        copies[0].add_(0.5)
    after = wrapped.get_base_model().logits(ids, [group])
    assert (before[1] - after[1]).abs().max() > 1e-3
    sum(logits.sum() for logits in after).backward()
    assert copies[0].grad is not None and copies[0].grad.abs().sum() > 0
    trained = merged(wrapped, model)
    value = trained.get_submodule(part).get_submodule(layer).weight
    assert torch.equal(value, copies[0])
