"""Settings of the loop do what they say: precision, recomputed activations, schedules, early stopping, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from training import figures_in, samples_in, small_config, small_model

from edgeomni.data.sample import Sample
from edgeomni.errors import TrainError
from edgeomni.spec import Task
from edgeomni.text import Tokenizer
from edgeomni.train import fit
from edgeomni.train.batching import Batch, BatchPlan, Draw
from edgeomni.train.codes import codec_frames
from edgeomni.train.config import LossConfig
from edgeomni.train.dataset import BadSamples, Collator, Reader, usable
from edgeomni.train.loop import OmniTrainer, arguments
from edgeomni.train.trainable import TrainableOmni

RATE = 2e-3
WHOLE = {"peft": {"dropout": 0.0}, "lora": False}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples_in(tmp_path_factory.mktemp("samples"), 6)


def test_precision_is_that_of_the_computation(samples: list[Sample]) -> None:
    first = {}
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        model, seen = small_model(), set[torch.dtype]()
        for layer in model.body.layers:
            layer.mlp.down_proj.register_forward_hook(lambda _m, _i, out, seen=seen: seen.add(out.dtype))
        trained = fit(model, samples, small_config(run={"precision": precision}, optimizer={"steps": 2}))
        assert seen == {dtype}
        assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
        first[precision] = trained.log[0]["loss"]
    assert len(set(first.values())) == 3 and list(first.values()) == pytest.approx([first["fp32"]] * 3, abs=0.01)


def test_recomputed_activations_change_no_loss(samples: list[Sample]) -> None:
    logs, calls = [], []
    for recomputed in (False, True):
        model, count = small_model(), [0]
        model.body.layers[0].mlp.down_proj.register_forward_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        run = {"gradient_checkpointing": recomputed}
        trained = fit(model, samples, small_config(run=run, optimizer={"steps": 4}))
        logs.append([line["loss"] for line in trained.log])
        calls.append(count[0])
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)
    assert calls == [4, 8]


class Fixed(BatchPlan):
    """A plan of given batches."""

    given: tuple[Batch, ...] = ()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        return iter(self.given[start:])


def test_accumulated_batches_equal_one_large_one(samples: list[Sample], tmp_path: Path) -> None:
    """Batches of unlike lengths and tasks, so that a mean of means would be another loss."""
    tasks: tuple[Task, ...] = ("aa", "tt", "ta", "asr", "at", "aa", "tt", "ta")
    draws = [Draw(i % 6, task, i) for i, task in enumerate(tasks)]
    large = steps_over([draws[:4], draws[4:]], samples, 1, tmp_path)
    small = steps_over([draws[:1], draws[1:4], draws[4:7], draws[7:]], samples, 2, tmp_path)
    assert len(large[0]) == len(small[0]) == 4
    assert large[0] == pytest.approx(small[0], rel=3e-6)
    for name, value in large[1].items():
        torch.testing.assert_close(value, small[1][name], rtol=0, atol=1e-6, msg=name)


def steps_over(
    batches: list[Batch], samples: list[Sample], accumulate: int, folder: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two updates over these batches: losses and norms of gradients, and the weights.

    Adam makes steps of the rate's size of any gradient, also of rounding errors, so that the rate is a small one.
    """
    from edgeomni.train.config import resolved
    from edgeomni.train.stages import modes_of

    model, asked = small_model(), small_config(optimizer={"steps": 2, "accumulate": accumulate, "lr": 2e-5}, **WHOLE)
    collator, data = collator_of(model, samples)
    trainable = TrainableOmni(model, LossConfig())
    trainable.body.requires_grad_(True)
    trainable.tables.requires_grad_(True)
    plan = Fixed(data.lengths, data.members, {"aa": 1.0}, 4, 0)
    object.__setattr__(plan, "given", tuple(batches))
    args = arguments(resolved(asked, modes_of(asked)), folder, False, folder)
    args.save_strategy = "no"
    trainer = OmniTrainer(trainable, args, plan, collator, None, [])
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [line[key] for line in lines for key in ("loss", "grad_norm")], {
        name: p.detach().clone() for name, p in trainable.named_parameters()
    }


def collator_of(model: Any, samples: list[Sample]) -> tuple[Collator, Any]:
    tokenizer = Tokenizer(model.tokenizer_json, model.spec.layout)
    reader = Reader(model.spec, tokenizer, lambda s: codec_frames(model.codec, model.spec.codec, s))
    data = usable(samples, ("asr", "tt", "at", "ta", "aa"), reader, BadSamples(0))
    return Collator(data, reader, BadSamples(0)), data


SCHEDULES: dict[str, list[float]] = {
    "constant": [1, 1, 1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 1 / 2, 1, 1, 1, 1, 1, 1],
    "linear": [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [0, 1 / 2, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_by_hand(samples: list[Sample], schedule: str) -> None:
    """Eight steps, of which a quarter warm up."""
    config = small_config(tasks={"tt": 1.0}, optimizer={"schedule": schedule, "warmup": 0.25, "batch": 1})
    trained = fit(small_model(), samples, config)
    expected = [RATE * factor for factor in SCHEDULES[schedule]]
    assert [line["learning_rate"] for line in trained.log] == pytest.approx(expected, rel=1e-9)


def test_early_stopping_restores_the_best_state_even_between_saved_ones(samples: list[Sample], tmp_path: Path) -> None:
    """A rate that soon makes the validation worse; stage 1 without LoRA has the checkpoint's own tensors in a state."""
    run = {"log_every": 1, "validate_every": 1, "save_every": 25, "patience": 3, "keep": 1}
    config = small_config(stage="1", run=run, optimizer={"lr": 0.05, "steps": 50}, tasks={"ta": 1.0}, **WHOLE)
    fit(small_model(), samples[:3], config, tmp_path / "run", validation=samples[3:])
    found = {line["step"]: line["eval_loss"] for line in figures_in(tmp_path / "run") if "eval_loss" in line}
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(1, best + 4)) and best + 3 < 25
    state = load_file(tmp_path / "run" / "states" / f"checkpoint-{best}" / "model.safetensors")
    weights = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    text_vocab = small_model().spec.layout.text_vocab
    np.testing.assert_array_equal(weights["embedding.weight"][text_vocab:], state["tables.audio.weight"])
    adapters = [name for name in state if name.startswith("adapter.")]
    assert adapters and all(np.array_equal(weights[name], state[name]) for name in adapters)


def test_the_validation_loss_is_that_of_all_held_out_samples_at_once(samples: list[Sample]) -> None:
    """Sample by sample, without padding or batches, on the model that the run returned."""
    from edgeomni.train.frames import IGNORED

    run = {"validate_every": 2, "save_every": 2}
    config = small_config(optimizer={"steps": 2, "batch": 2}, run=run, tasks={"aa": 1.0, "asr": 1.0})
    trained = fit(small_model(), samples[:3], config, validation=samples[3:])
    logged = next(line["eval_loss"] for line in trained.log if "eval_loss" in line)
    model, streams = trained.model, trained.model.spec.layout.streams
    collator, _ = collator_of(model, samples)
    totals, counts = np.zeros(streams + 1), np.zeros(streams + 1)
    spoken: tuple[Task, ...] = ("aa", "asr")
    for index, task in ((i, task) for i in (3, 4, 5) for task in spoken):
        batch = collator([Draw(index, task, 0)])
        features = []
        for group in batch["mels"]:
            encoded = model.encode(group["mel"])
            features += [(int(group["start"][0]), encoded[0, : int(group["count"][0])])]
        with torch.no_grad():
            text, audio = model(batch["ids"], features)
        for stream in range(streams + 1):
            logits = text[0] if stream == streams else audio[0, :, stream]
            labels = batch["labels"][0, stream]
            at = labels != IGNORED
            log = torch.log_softmax(logits[at].double(), -1)
            totals[stream] -= float(log.gather(1, labels[at][:, None]).sum())
            counts[stream] += int(at.sum())
    means = totals / counts
    assert logged == pytest.approx((means[:streams].mean() + means[streams]) / 2, abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_has_the_figures_of_the_log(samples: list[Sample], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = {"tensorboard": True, "validate_every": 2}
    config = small_config(run=run, optimizer={"steps": 4})
    fit(small_model(), samples[:4], config, tmp_path / "run", validation=samples[4:])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("train/loss_text", "loss_text"), ("eval/loss", "eval_loss")):
        logged = [(line["step"], line[key]) for line in figures_in(tmp_path / "run") if key in line]
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in written] == [step for step, _ in logged]
        assert [v for _, v in written] == pytest.approx([v for _, v in logged], rel=1e-6)


def test_no_batch_holds_more_frames_than_allowed(samples: list[Sample]) -> None:
    given: dict[str, Any] = {"batch": 6, "steps": 8}
    tasks = {"aa": 1.0, "tt": 1.0}
    free = frames_of_steps(fit(small_model(), samples, small_config(optimizer=given, tasks=tasks)).log)
    least = max(free) // 3
    bound = fit(small_model(), samples, small_config(optimizer={**given, "max_frames": least}, tasks=tasks)).log
    assert max(free) > least >= max(frames_of_steps(bound))
    with pytest.raises(TrainError, match="raise max_frames"):
        fit(small_model(), samples, small_config(optimizer={**given, "max_frames": 10}, tasks=tasks))


def frames_of_steps(log: list[dict[str, Any]]) -> list[int]:
    return [int(n) for n in np.diff([0, *(line["frames"] for line in log)])]
