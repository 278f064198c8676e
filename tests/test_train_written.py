"""Text injection: a recording in whose place the model is given what it says (augment.written_chance)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from training import samples_in, small_model

from edgeomni.data.sample import Sample
from edgeomni.spec import Task
from edgeomni.text import Tokenizer
from edgeomni.train.augment import AugmentConfig, Augmenter
from edgeomni.train.codes import codec_frames
from edgeomni.train.dataset import Reader
from edgeomni.train.frames import padding

TASKS: tuple[Task, ...] = ("asr", "at", "aa")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples_in(tmp_path_factory.mktemp("samples"), 2)


def reading(model: Any, augmenter: Augmenter | None = None) -> Reader:
    tokenizer = Tokenizer(model.tokenizer_json, model.spec.layout)
    return Reader(model.spec, tokenizer, lambda s: codec_frames(model.codec, model.spec.codec, s), augmenter)


def test_a_recording_that_is_written_has_its_words_in_the_place_of_its_features(samples: list[Sample]) -> None:
    """All that stands before and behind them stays, prompt and answer."""
    model = small_model()
    layout, tokenizer = model.spec.layout, Tokenizer(model.tokenizer_json, model.spec.layout)
    writing = Augmenter(AugmentConfig(written_chance=1.0, written_gap=(1.0, 2.0)))
    sample = samples[0]
    for task in TASKS:
        reader = reading(model, writing)
        item = reader.item(sample, task, seed=5)
        assert not item.heard and item.transcript == ""
        place = writing.written(tokenizer.encode(sample.text), layout, 5, model.spec.encoder.context)
        assert place is not None
        plain = reading(model).item(sample, task)
        count = plain.heard[0].features
        first = plain.frames.feature_start
        assert item.frames.feature_start == first
        assert item.frames.ids[-1, first : first + len(place)].tolist() == place.tolist()
        for kind in ("ids", "labels"):
            ours, theirs = getattr(item.frames, kind), getattr(plain.frames, kind)
            assert (ours[:, :first] == theirs[:, :first]).all()
            assert (ours[:, first + len(place) :] == theirs[:, first + count :]).all()
        assert (item.frames.ids[:-1, first : first + len(place)] == padding(layout)[:-1]).all()
        assert reader.item(sample, task).heard  # validation hears it


def test_a_recording_without_a_transcript_is_heard(samples: list[Sample]) -> None:
    model = small_model()
    reader = reading(model, Augmenter(AugmentConfig(written_chance=1.0)))
    assert reader.item(replace(samples[0], text=""), "at", seed=5).heard
    assert reader.item(samples[0], "tt", seed=5).frames.ids.shape == reader.item(samples[0], "tt").frames.ids.shape


def test_a_recording_whose_words_would_not_fit_the_context_is_heard(samples: list[Sample]) -> None:
    """And one whose words fit exactly is written: what fits as a recording is never lost."""
    model = small_model()
    gap = 8.0  # longer than the recording
    reader = reading(model, Augmenter(AugmentConfig(written_chance=1.0, written_gap=(gap, gap))))
    for task in TASKS:
        length = reader.item(samples[0], task, seed=5).frames.length
        for context, written in ((length, True), (length - 1, False)):
            reader.spec = replace(model.spec, context=context)
            assert (not reader.item(samples[0], task, seed=5).heard) is written
        reader.spec = model.spec


def test_a_transcript_that_is_changed_is_changed_in_prompt_and_answer_alike(samples: list[Sample]) -> None:
    model = small_model()
    layout = model.spec.layout
    writing = AugmentConfig(written_chance=1.0, written_gap=(0.0, 1.0), written_edit_share=0.5)
    reader, plain = reading(model, Augmenter(writing)), reading(model)
    said = Tokenizer(model.tokenizer_json, layout).encode(samples[0].text)
    for seed in range(20):
        item = reader.item(samples[0], "asr", seed)
        first = item.frames.feature_start
        read = item.frames.ids[-1, first : plain.item(samples[0], "at").frames.length]
        labels = [i for i in item.frames.labels[-1].tolist() if 0 <= i < layout.eot]
        assert labels == [i for i in read[: read.tolist().index(layout.asr)].tolist() if i < layout.eot]
        if labels != said:
            break
    else:
        raise AssertionError("no transcript was changed")
    # Of a question that is to be answered, nothing is changed.
    question = reader.item(samples[0], "at", seed).frames
    assert [i for i in question.ids[-1, question.feature_start :].tolist() if i < layout.eot][: len(said)] == said


def test_ids_are_dropped_replaced_and_exchanged_as_often_as_configured() -> None:
    layout = small_model().spec.layout
    ids = [3, 1, 2]
    kinds: Counter[str] = Counter()
    augmenter = Augmenter(AugmentConfig(written_edit_share=0.3))
    for seed in range(3000):
        out = augmenter.edited(ids, layout, seed)
        assert out and all(0 <= i < layout.eot for i in out) and len(out) <= len(ids)
        assert out == augmenter.edited(ids, layout, seed)
        if out == ids:
            kinds["same"] += 1
        elif out in ([1, 2], [3, 2], [3, 1]):
            kinds["one dropped"] += 1
        elif len(out) == 3 and sorted(out) == [1, 2, 3]:
            kinds["exchanged"] += 1
        elif len(out) == 3 and sum(a != b for a, b in zip(out, ids, strict=True)) == 1:
            kinds["one replaced"] += 1
    # The last id has nothing to be exchanged with. One change of a kind: 0.1 * 0.49 for each of three ids, and a bit.
    assert kinds["same"] / 3000 == pytest.approx(0.7**2 * 0.8, abs=0.03)
    assert kinds["one dropped"] / 3000 == pytest.approx(0.16, abs=0.03)
    assert kinds["one replaced"] / 3000 == pytest.approx(0.16, abs=0.03)
    assert 0.1 < kinds["exchanged"] / 3000 < 0.2
    assert Augmenter(AugmentConfig()).edited(ids, layout, 0) == ids
    assert Augmenter(AugmentConfig(written_edit_share=1.0)).edited([5], layout, 0)
