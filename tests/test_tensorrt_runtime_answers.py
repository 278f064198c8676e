"""Encoder, codec and whole answers of TensorRT's adapters on recorded CUDA, against independent answers.

Those are the published code's tokens, and what ONNX Runtime's own adapters give on the same bundle, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from engines_here import random_ids, truth
from tensorrt_parts import Machine, machine, with_ort, write_bundle

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.bundle import Bundle
from edgeomni.components import Components
from edgeomni.engines import COMPONENTS
from edgeomni.errors import EngineError
from edgeomni.model.omni import OmniModel
from edgeomni.sampling import Sampling
from edgeomni.spec import AUDIO_OUT

GREEDY = Sampling(greedy=True)
TASKS = {"aa": "AA", "at": "AT", "asr": "ASR", "ta": "TA", "tt": "TT", "two-row aa": "BATCH", "stream": "STREAM"}


@pytest.fixture(scope="module")
def tiny(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "tiny")


@pytest.fixture(scope="module")
def here(tiny: Bundle) -> Iterator[Machine]:
    """A recorded machine on which nothing may be left when all is closed."""
    with machine() as recorded:
        yield recorded
    assert recorded.cuda.leaks() == []
    assert len(recorded.tensorrt.living) == 0


@pytest.fixture(scope="module")
def parts(here: Machine, tiny: Bundle) -> Iterator[Components]:
    opened = Components(*(here.open(tiny, name) for name in COMPONENTS))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def ort_codec(tiny: Bundle) -> Any:
    return with_ort(tiny, "codec")


# --- encoder and codec


def test_the_encoder_gives_what_onnx_runtime_gives(parts: Components, tiny: Bundle, tiny_model: OmniModel) -> None:
    ours, theirs = parts.encoder, with_ort(tiny, "encoder")
    n_mels, most = tiny_model.spec.front_end.n_mels, 2 * tiny_model.spec.encoder.context
    for frames in (2, 100, most, 60):
        mel = np.random.default_rng(frames).standard_normal((n_mels, frames)).astype(np.float32)
        before = mel.copy()
        np.testing.assert_array_equal(ours.encode(mel), theirs.encode(mel))
        assert ours.encode(mel, 1).shape == (1, tiny_model.spec.body.width)
        np.testing.assert_array_equal(mel, before)
    for wrong in ((n_mels, 3), (n_mels, 0), (n_mels, most + 2), (n_mels + 1, 4)):
        with pytest.raises(EngineError, match="split the audio"):
            ours.encode(np.zeros(wrong, np.float32))


def codes_of(model: OmniModel, frames: int, seed: int = 0) -> list[np.ndarray]:
    codec, rng = model.spec.codec, np.random.default_rng(seed)
    return [rng.integers(0, codec.codebook_size, frames * n) for n in codec.ids_per_level]


def pushed(codec: Any, codes: Sequence[np.ndarray], sizes: Sequence[int], seed: int | None) -> Iterator[np.ndarray]:
    stream, at = codec.open(seed), 0
    for i, n in enumerate(sizes):
        piece = [c[at * k : (at + n) * k] for c, k in zip(codes, codec.spec.ids_per_level, strict=True)]
        yield codec.decode(piece, stream, i == len(sizes) - 1)
        at += n


@pytest.mark.parametrize("sizes", [(3, 4, 4, 4, 2), (1,) * 6, (13,), (4, 4, 4), (2, 0), (5, 1, 4, 4, 0)])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_codec_gives_what_onnx_runtime_gives(
    parts: Components, ort_codec: Any, tiny_model: OmniModel, sizes: tuple[int, ...], seed: int | None
) -> None:
    codes = codes_of(tiny_model, sum(sizes))
    pairs = zip(pushed(parts.codec, codes, sizes, seed), pushed(ort_codec, codes, sizes, seed), strict=True)
    total = 0
    for wave, expected in pairs:
        np.testing.assert_array_equal(wave, expected)
        total += len(wave)
    assert total == sum(sizes) * tiny_model.spec.codec.frame_samples


def test_streams_of_several_sessions_take_turns(
    here: Machine, parts: Components, ort_codec: Any, tiny_model: OmniModel
) -> None:
    """Each stream's states are moved out of the working memory while another one is at it."""
    all_codes = [codes_of(tiny_model, 12, seed) for seed in range(3)]
    streams = [pushed(parts.codec, codes, (4, 3, 5), i) for i, codes in enumerate(all_codes)]
    expected = [list(pushed(ort_codec, codes, (4, 3, 5), i)) for i, codes in enumerate(all_codes)]
    for at in range(3):
        for stream, waves in zip(streams, expected, strict=True):
            np.testing.assert_array_equal(next(stream), waves[at])
    before = here.cuda.used()
    del streams, stream
    streams = [pushed(parts.codec, codes, (4, 3, 5), i) for i, codes in enumerate(all_codes)]
    for at in range(3):
        for stream, waves in zip(streams, expected, strict=True):
            np.testing.assert_array_equal(next(stream), waves[at])
    assert here.cuda.used() == before, "the memory of streams that are gone serves again"


def test_a_usual_push_is_one_launch(here: Machine, parts: Components, tiny_model: OmniModel) -> None:
    sizes = (4, 4, 4, 1)
    stream = pushed(parts.codec, codes_of(tiny_model, sum(sizes)), sizes, None)
    next(stream)
    for _ in range(2):
        here.cuda.taken()
        next(stream)
        assert here.cuda.taken() == ["cudaGraphLaunch up engine on-device down", "cudaStreamSynchronize"]
    next(stream)


# --- whole answers


@pytest.fixture(scope="module")
def answers(golden: Golden, golden_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    bundle = write_bundle(golden_model, tmp_path_factory.mktemp("golden") / "bundle")
    with machine() as recorded:
        parts = Components(*(recorded.open(bundle, name) for name in COMPONENTS))
        yield Session(parts, golden_model.spec, golden_model.tokenizer_json)
        parts.close()
    assert recorded.cuda.leaks() == []


@pytest.mark.parametrize("name", TASKS)
def test_greedy_streams_are_the_published_code_s(name: str, answers: Session, golden: Golden) -> None:
    two_row = TASKS[name] in ("BATCH", "STREAM")
    task: Any = "aa" if two_row else name
    question = {"audio": golden.path / "question.wav"} if task[0] == "a" else {"text": golden.meta["text"]}
    limit = golden.meta["max_returned_tokens"]
    *_, end = answers.respond(task, sampling=GREEDY, max_length=limit, two_row=two_row, **question)
    assert isinstance(end, TurnEnd)
    expected = golden[f"{TASKS[name]}_tokens"]
    np.testing.assert_array_equal(end.tokens if task in AUDIO_OUT else end.tokens[-1], expected)


def test_a_seeded_answer_is_onnx_runtime_s_to_the_sample(
    parts: Components, tiny: Bundle, tiny_model: OmniModel
) -> None:
    """Sampled, two rows at first, codec noise on: ids and sound are the same."""
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    rule = Sampling(temperature=1.0, top_k=20, seed=3)
    ends, waves = list[TurnEnd](), list[np.ndarray]()
    for components in (parts, Components(*(with_ort(tiny, name) for name in COMPONENTS))):
        session = Session(components, tiny_model.spec, tiny_model.tokenizer_json)
        asked: dict[str, Any] = {
            "audio": sound,
            "sample_rate": 16000,
            "sampling": rule,
            "max_length": 90,
            "noise_seed": 5,
        }
        events = list(session.respond("aa", **asked))
        waves.append(np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)]))
        assert isinstance(events[-1], TurnEnd)
        ends.append(events[-1])
    np.testing.assert_array_equal(ends[0].tokens, ends[1].tokens)
    assert len(waves[0]) > 4 * tiny_model.spec.codec.frame_samples
    np.testing.assert_array_equal(waves[0], waves[1])


def test_a_tts_adapter_runs_behind_the_body(here: Machine, shelf: Path, tmp_path: Path) -> None:
    from edgeomni.model.compose import compose

    folder = shelf / "parts"
    model = compose(str(folder / "encoder"), str(folder / "llm"), str(folder / "codec"), tts_layers=2)
    bundle = write_bundle(model, tmp_path / "tts")
    llm = here.open(bundle, "llm")
    ids = random_ids(model, 7, rows=2)
    ids[1, :, :4] = ids[0, :, :4]
    expected, state = [truth(model, ids[row : row + 1]) for row in (0, 1)], llm.start(2, 7)
    llm.forward(np.ascontiguousarray(ids[:1, :, :4]), (), state)
    llm.fork(state)
    for at in range(4, 7):
        hidden = llm.forward(np.ascontiguousarray(ids[:, :, at : at + 1]), (), state)
        for row in (0, 1):
            np.testing.assert_allclose(llm.text_logits(hidden, row), expected[row][0][at], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(llm.audio_logits(hidden, 0), expected[0][1][at], atol=1e-4, rtol=1e-4)
        with pytest.raises(EngineError, match="row 0 only"):
            llm.audio_logits(hidden, 1)
    llm.close()
