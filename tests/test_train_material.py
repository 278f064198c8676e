"""What a run learns from: split, mixed, validated on in part, and told apart from other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training import samples_in, small_model

from edgeomni.chat import ChatSpec
from edgeomni.data.sample import Sample
from edgeomni.errors import CheckpointError, DataError
from edgeomni.spec import Task
from edgeomni.text import Tokenizer
from edgeomni.train import TrainConfig, fit
from edgeomni.train.config import DataConfig, OptimizerConfig, RunConfig, resolved
from edgeomni.train.dataset import BadSamples, Collator, Reader, Usable, usable
from edgeomni.train.material import HeldOut, fingerprint, mix, split
from edgeomni.train.stages import modes_of


def written(count: int) -> list[Sample]:
    """Samples of task tt whose questions grow longer and longer."""
    return [Sample(f"made:{i}", text=" ".join(["one"] * (1 + i)), answer="two") for i in range(count)]


def usable_of(model: Any, samples: list[Sample], tasks: list[Task]) -> tuple[Usable, Reader]:
    tokenizer = Tokenizer(model.tokenizer_json, model.spec.layout)
    reader = Reader(model.spec, tokenizer, lambda x: pytest.fail("no sound is asked for"))
    return usable(samples, tasks, reader, BadSamples(0)), reader


def test_a_split_is_a_partition_of_the_asked_size_and_the_same_for_a_seed() -> None:
    samples = written(20)
    learn, held = split(samples, 0.25, 3)
    assert len(held) == 5 and sorted(s.where for s in learn + held) == sorted(s.where for s in samples)
    assert [s.where for s in split(samples, 0.25, 3)[1]] == [s.where for s in held]
    assert [s.where for s in split(samples, 0.25, 4)[1]] != [s.where for s in held]
    assert split(samples, 0.0, 3) == (samples, [])


@pytest.mark.parametrize(("limit", "rows"), [(0, 10), (4, 4), (99, 10)])
def test_validation_goes_through_every_sample_once_or_through_as_many_as_allowed(limit: int, rows: int) -> None:
    data, reader = usable_of(small_model(), written(10), ["tt"])
    held = HeldOut(data, Collator(data, reader, BadSamples(0)), 3, limit)
    batches = [batch["ids"] for batch in held]
    assert [len(b) for b in batches] == [3] * (rows // 3) + ([rows % 3] if rows % 3 else [])
    lengths = [int((row[-1] != reader.spec.layout.pad_t).sum()) for b in batches for row in b]
    assert lengths == sorted(lengths) and len(set(lengths)) == rows
    assert [b.tolist() for b in batches] == [batch["ids"].tolist() for batch in held]


def test_the_mix_leaves_out_what_no_sample_serves_and_refuses_what_was_asked_for() -> None:
    data, _ = usable_of(small_model(), written(3), ["tt", "at"])
    config = TrainConfig(stage="2")
    settled = resolved(config, modes_of(config))
    assert mix(settled, {}, data) == {"tt": 1.0}
    with pytest.raises(DataError, match="no sample serves task at;"):
        mix(settled, {"tt": 1.0, "at": 1.0}, data)
    empty, _ = usable_of(small_model(), [], ["tt", "at"])
    with pytest.raises(DataError, match=r"no sample serves any task of stage 2 \(tt, at\)"):
        mix(settled, {}, empty)


def test_other_samples_have_another_fingerprint() -> None:
    model = small_model()
    whole = fingerprint(usable_of(model, written(3), ["tt"])[0])
    assert whole == fingerprint(usable_of(model, written(3), ["tt"])[0]) and whole["samples"] == 3
    assert whole != fingerprint(usable_of(model, written(4), ["tt"])[0])
    assert whole != fingerprint(usable_of(model, written(3)[::-1], ["tt"])[0])
    other = [*written(2), Sample("made:2", text="one one one", answer="three")]
    assert whole != fingerprint(usable_of(model, other, ["tt"])[0])


def test_a_stop_word_that_the_tokenizer_lacks_is_refused_before_training(tmp_path: Path) -> None:
    chat = ChatSpec(stop_words=("<|im_end|>",))
    config = TrainConfig(stage="2", chat=chat, optimizer=OptimizerConfig(steps=1, batch=1))
    with pytest.raises(CheckpointError, match="stop word"):
        fit(small_model(), samples_in(tmp_path / "data"), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_validates_on_as_many_as_it_may(tmp_path: Path) -> None:
    """Of six samples that serve task tt two are seen: the validation loss is that of two, not of six."""
    samples = samples_in(tmp_path, 6)

    def loss(limit: int) -> float:
        config = TrainConfig(
            stage="2",
            tasks={"tt": 1.0},
            data=DataConfig(validation_limit=limit),
            optimizer=OptimizerConfig(steps=1, batch=1, lr=0.0),
            run=RunConfig(log_every=1, save_every=1),
        )
        log = fit(small_model(), samples, config, validation=samples).log
        return float(next(line["eval_loss"] for line in log if "eval_loss" in line))

    assert loss(0) == loss(6) == loss(9) != loss(2)


def test_samples_without_a_place_of_their_own_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    """A bad one among good ones of the same name takes none of them with it; the second bad one is one too many."""
    good = [Sample("", text="one", answer="two") for _ in range(3)]
    broken = [Sample("", text="one", answer="")]
    model, bad = small_model(), BadSamples(1)
    reader = Reader(model.spec, Tokenizer(model.tokenizer_json, model.spec.layout), lambda x: pytest.fail("no sound"))
    for sample in broken:
        bad.add(sample, DataError("no answer"))
        bad.add(sample, DataError("no answer"))
    assert broken[0] in bad and not any(sample in bad for sample in good)
    data = usable([*good, *broken], ["tt"], reader, bad)
    assert data.members["tt"] == [0, 1, 2]
    assert "1 of 4 samples serve none of the tasks tt" in caplog.messages
    with pytest.raises(DataError, match="2 samples cannot be used"):
        bad.add(good[0], DataError("no answer"))
