"""The shipped model has learned something: its precisions are compared by answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeomni import AudioChunk, Session, TurnEnd, load
from edgeomni.data.readers import read_data
from edgeomni.data.sample import Sample
from edgeomni.data.synth import synthesize
from edgeomni.evaluate import evaluate
from edgeomni.export import export_bundle
from edgeomni.model import checkpoints
from edgeomni.sampling import Sampling
from edgeomni.tokens import frames_to_codes, undelay
from edgeomni.train import TrainConfig, fit, merge
from edgeomni.train.config import OptimizerConfig, PeftConfig, RunConfig

QUESTIONS = 40
GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Forty questions in wordings and by voices that training never had."""
    folder = tmp_path_factory.mktemp("nano") / "data"
    synthesize("nano", folder, samples=QUESTIONS, workers=1)
    return list(read_data(folder / "test.jsonl").samples)


@pytest.fixture(scope="module")
def fp32() -> Iterator[Session]:
    with Session.open("nano", engine="torch") as session:
        yield session


@pytest.fixture(scope="module")
def int4() -> Iterator[Session]:
    with load("nano") as session:
        yield session


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session.open(export_bundle("nano", tmp_path_factory.mktemp("nano") / "int8", precision="int8")) as session:
        yield session


def texts(session: Session, samples: list[Sample], task: Any) -> list[str]:
    return [row.text for row in evaluate(session, samples, tasks=[task]).rows]


def test_written_questions_are_answered_as_by_fp32(
    fp32: Session, int4: Session, int8: Session, questions: list[Sample]
) -> None:
    """Of 40 answers INT8 may turn one, and INT4 three."""
    wanted = texts(fp32, questions, "tt")
    for session, most in ((int8, 1), (int4, 3)):
        turned = [(a, b) for a, b in zip(wanted, texts(session, questions, "tt"), strict=True) if a != b]
        assert len(turned) <= most, turned


def test_spoken_questions_are_answered_as_well_as_by_fp32(
    fp32: Session, int4: Session, int8: Session, questions: list[Sample]
) -> None:
    """What nano hears unsurely may turn either way, so that right answers are counted: INT8 may lose two, INT4 four."""
    original, *exported = [evaluate(session, questions, tasks=["asr", "at"]) for session in (fp32, int8, int4)]
    for found, most in zip(exported, (2, 4), strict=True):
        lost = original.metrics("at")["exact"].value - found.metrics("at")["exact"].value
        assert QUESTIONS * lost <= most
        assert found.metrics("asr")["wer"].value <= original.metrics("asr")["wer"].value + most / 100


def test_it_has_learned(int4: Session, questions: list[Sample]) -> None:
    """Below what docs/nano.md measures on more questions, and far above what a broken export reaches."""
    found = evaluate(int4, questions, tasks=["asr", "tt", "at"])
    assert found.metrics("asr")["wer"].value < 0.2
    assert found.metrics("tt")["exact"].value > 0.85
    assert found.metrics("at")["exact"].value > 0.7


def ended(session: Session, **how: Any) -> tuple[TurnEnd, np.ndarray]:
    """The end of a turn, and all of its sound."""
    chunks = [np.zeros(0, np.float32)]
    for event in session.respond(sampling=GREEDY, max_seconds=8, **how):
        if isinstance(event, AudioChunk):
            chunks.append(event.samples)
        elif isinstance(event, TurnEnd):
            end = event
    return end, np.concatenate(chunks)


def test_two_rows_and_one_row_say_the_same(int4: Session, questions: list[Sample]) -> None:
    sounds = [sample.sound(int4.spec.front_end.sample_rate) for sample in questions[:20]]
    both = [[ended(int4, task="aa", audio=s, two_row=rows)[0].text for rows in (True, False)] for s in sounds]
    assert sum(a == b for a, b in both) >= 12, both


def test_streamed_sound_is_the_offline_decode(int4: Session, questions: list[Sample]) -> None:
    model = checkpoints.load("nano")
    codec = model.spec.codec
    for sample in questions[:5]:
        end, sound = ended(int4, task="ta", text=sample.text)
        frames = undelay(end.tokens[: codec.streams].astype(np.int64))
        assert len(frames) and (frames < codec.codebook_size).all()
        with torch.no_grad():
            codes = [torch.from_numpy(level)[None] for level in frames_to_codes(frames, codec)]
            wanted = model.decode_codes(codes).flatten().numpy()
        assert np.abs(wanted).max() > 0.05
        np.testing.assert_allclose(sound, wanted[: len(sound)], atol=1e-4)
        assert len(wanted) - len(sound) < codec.frame_samples


def test_a_language_lora_loads_merges_and_exports(tmp_path: Path) -> None:
    """Spanish, a few steps: the loss falls, and an export of the merged model answers as the run does."""
    synthesize("nano-es", tmp_path / "es", samples=64, workers=1)
    config = TrainConfig(
        stage="end-to-end",
        checkpoint="nano",
        tasks={"tt": 1.0},
        peft=PeftConfig(rank=8),
        optimizer=OptimizerConfig(steps=30, batch=16, lr=4e-3),
        run=RunConfig(log_every=5, save_every=30),
    )
    samples = list(read_data(tmp_path / "es" / "train.jsonl").samples)
    trained = fit(checkpoints.load("nano"), samples, config, tmp_path / "run")
    losses = [line["loss"] for line in trained.log if "loss" in line]
    assert losses[-1] < 0.6 * losses[0], losses
    merge(tmp_path / "run", tmp_path / "merged")
    bundle = export_bundle(tmp_path / "merged", tmp_path / "bundle", precision="fp32")
    with Session.open(tmp_path / "run") as run, Session.open(bundle) as served:
        assert texts(run, samples[:5], "tt") == texts(served, samples[:5], "tt")
