"""One batch learned by heart: a loss below 0.05 on every task, and exactly these answers when asked, greedily."""

from __future__ import annotations

from typing import Any

import pytest
from training import samples_in, small_model

from edgeomni.arrays import I64
from edgeomni.components import OpenOptions
from edgeomni.data.sample import Sample
from edgeomni.runtimes.torch import components_of
from edgeomni.sampling import Sampling
from edgeomni.session import Session, TurnEnd
from edgeomni.spec import TASKS, Task
from edgeomni.text import Tokenizer
from edgeomni.tokens import undelay
from edgeomni.train import TrainConfig, fit
from edgeomni.train.batching import Draw
from edgeomni.train.codes import codec_frames
from edgeomni.train.config import PARTS, LearnConfig, LossConfig, OptimizerConfig, RunConfig
from edgeomni.train.dataset import BadSamples, Collator, Reader, Usable
from edgeomni.train.trainable import TrainableOmni

STEPS = 220


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Sample]]:
    """A model that has seen two samples, each as all five tasks, in every one of its steps."""
    samples = samples_in(tmp_path_factory.mktemp("overfit"), 2)
    config = TrainConfig(
        stage="end-to-end",
        lora=False,
        learn=LearnConfig(**dict.fromkeys(PARTS, "train")),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(steps=STEPS, batch=10, lr=4e-3, weight_decay=0.0),
        run=RunConfig(log_every=STEPS, save_every=STEPS),
    )
    return fit(small_model(), samples, config).model, samples


def spoken_codes(model: Any, sample: Sample) -> I64:
    assert sample.answer_audio is not None
    return codec_frames(model.codec, model.spec.codec, sample.answer_audio.read(model.spec.codec.sample_rate))


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_every_task_is_below_a_twentieth(learned: tuple[Any, list[Sample]], task: Task) -> None:
    model, samples = learned
    reader = Reader(
        model.spec,
        Tokenizer(model.tokenizer_json, model.spec.layout),
        lambda x: codec_frames(model.codec, model.spec.codec, x),
    )
    data = Usable(samples, {task: [0, 1]}, {})
    batch = Collator(data, reader, BadSamples(0))([Draw(0, task, 0), Draw(1, task, 1)])
    assert float(TrainableOmni(model, LossConfig())(**batch)["loss"]) < 0.05


@pytest.mark.parametrize("two_row", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_greedy_answers_are_exact(learned: tuple[Any, list[Sample]], task: Task, two_row: bool) -> None:
    """Text to the last word and end, sound to the last code, by the same loop that serves."""
    model, samples = learned
    session = Session(components_of(model, OpenOptions()), model.spec, model.tokenizer_json)
    for sample in samples:
        asked = {"text": sample.text} if task in ("tt", "ta") else {"audio": str(sample.audio[0].source)}
        end = list(session.respond(task, **asked, sampling=Sampling(greedy=True), two_row=two_row))[-1]  # type: ignore[arg-type]
        assert isinstance(end, TurnEnd)
        assert end.text == (sample.text if task == "asr" else sample.answer)
        if task in ("aa", "ta"):
            assert end.reason == "eoa"
            assert undelay(end.tokens[:-1]).tolist() == spoken_codes(model, sample).tolist()
        else:
            assert end.reason == "eot"
