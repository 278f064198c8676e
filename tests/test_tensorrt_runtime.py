"""TensorRT's adapters on recorded CUDA and TensorRT: what they answer, and the calls by which they do.

Engines compute their graphs, so that every number is compared with an independent one: the published code's tokens, the
OmniModel itself, or ONNX Runtime's own adapters on the same bundle. The recorder refuses calls that CUDA forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_runtime_contract as contract
from conftest import Golden
from cuda_recorder import Recorder
from engines_here import matches, random_features, random_ids, truth
from tensorrt_parts import Machine, machine, write_bundle

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.bundle import Bundle
from edgeomni.components import Components, Features, OpenOptions
from edgeomni.engines import COMPONENTS
from edgeomni.errors import EngineError
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import onnxruntime
from edgeomni.sampling import Sampling
from edgeomni.spec import AUDIO_OUT

GREEDY = Sampling(greedy=True)
TASKS = {"aa": "AA", "at": "AT", "asr": "ASR", "ta": "TA", "tt": "TT", "two-row aa": "BATCH", "stream": "STREAM"}


@pytest.fixture(scope="module")
def tiny(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "tiny")


@pytest.fixture(scope="module")
def half(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "half", "fp16")


@pytest.fixture
def here() -> Iterator[Machine]:
    """A recorded machine on which nothing may be left when the test ends."""
    with machine() as recorded:
        yield recorded
    assert recorded.cuda.leaks() == []
    assert len(recorded.tensorrt.living) == 0


@pytest.fixture
def llm(here: Machine, tiny: Bundle) -> Iterator[Any]:
    opened = here.open(tiny, "llm")
    yield opened
    opened.close()


def with_ort(bundle: Bundle, name: str) -> Any:
    return onnxruntime.open_component(bundle, name, OpenOptions(threads=1))


# --- the language model

PROMISES = [
    contract.test_the_first_and_the_last_id_have_rows,
    contract.test_a_long_prompt_with_features_through_its_middle,
    contract.test_segments_count_from_the_ids_given_and_hold_for_every_row,
    contract.test_forked_rows_are_two_rows_and_the_last_can_go,
    contract.test_states_do_not_meet,
    contract.test_what_the_heads_give,
    contract.test_frames_are_chosen_as_the_logits_say,
    contract.test_the_caller_keeps_what_it_was_given,
    contract.test_a_single_frame_s_hidden_outlives_the_next_one,
    contract.test_the_caller_s_arrays_are_left_alone,
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.__name__)
def test_it_keeps_the_contract_of_all_engines(
    promise: Callable[[Any, OmniModel], None], llm: Any, tiny_model: OmniModel
) -> None:
    promise(llm, tiny_model)


@pytest.mark.parametrize("pieces", [(9,), (1, 8), (3, 3, 3), (1,) * 9])
def test_pieces_are_the_whole(llm: Any, tiny_model: OmniModel, pieces: tuple[int, ...]) -> None:
    contract.test_pieces_are_the_whole(llm, tiny_model, pieces)


def test_rows_asked_out_of_turn(llm: Any, tiny_model: OmniModel) -> None:
    """The heads read what the body left for them on the device, unless another row was asked for in between."""
    ids = random_ids(tiny_model, 3, rows=2)
    ids[1, :, :2] = ids[0, :, :2]
    state = llm.start(2, 3)
    llm.forward(np.ascontiguousarray(ids[:1, :, :2]), (), state)
    llm.fork(state)
    hidden = llm.forward(np.ascontiguousarray(ids[:, :, 2:]), (), state)
    expected = [truth(tiny_model, ids[row : row + 1]) for row in (0, 1)]
    for row in (1, 0, 1, 1, 0):
        matches(llm, hidden, row, expected[row])


def test_states_that_take_turns_keep_their_own_hidden(llm: Any, tiny_model: OmniModel) -> None:
    """What is left on the device for the heads belongs to whoever computed last."""
    ids = [random_ids(tiny_model, 4, seed) for seed in (1, 2)]
    expected = [truth(tiny_model, i) for i in ids]
    states = [llm.start(1, 4) for _ in ids]
    for at in range(4):
        hidden = [llm.forward(np.ascontiguousarray(i[:, :, [at]]), (), s) for i, s in zip(ids, states, strict=True)]
        for which in (0, 1, 0):
            matches(llm, hidden[which], 0, expected[which], at)


def test_half_precision_is_what_onnx_runtime_computes(here: Machine, half: Bundle, tiny_model: OmniModel) -> None:
    """The same graphs with caches in half precision, which only TensorRT's adapter keeps in that form."""
    ids, given = random_ids(tiny_model, 12), [Features(2, random_features(tiny_model, 5))]
    engines = [here.open(half, "llm"), with_ort(half, "llm")]
    states = [e.start(1, 12) for e in engines]
    for at, n in ((0, 7), (7, 1), (8, 1), (9, 1), (10, 2)):
        piece = np.ascontiguousarray(ids[:, :, at : at + n])
        ours, theirs = (e.forward(piece, given if not at else (), s) for e, s in zip(engines, states, strict=True))
        np.testing.assert_array_equal(engines[0].text_logits(ours, 0), engines[1].text_logits(theirs, 0))
        np.testing.assert_array_equal(engines[0].audio_logits(ours, 0), engines[1].audio_logits(theirs, 0))
    engines[0].close()


def test_refusals(llm: Any, tiny_model: OmniModel) -> None:
    ids, context = random_ids(tiny_model, 3), tiny_model.spec.context
    for rows, frames in ((1, 0), (1, context + 1), (3, 4), (0, 4)):
        with pytest.raises(EngineError, match=r"holds 1 to|1 to 2 rows"):
            llm.start(rows, frames)
    state = llm.start(1, 2)
    with pytest.raises(EngineError, match="3 are too many"):
        llm.forward(ids, (), state)
    with pytest.raises(EngineError, match="1 row.s. are active"):
        llm.forward(random_ids(tiny_model, 1, rows=2), (), state)
    with pytest.raises(EngineError, match="do not fit"):
        llm.forward(ids[:, :, :2].copy(), [Features(1, random_features(tiny_model, 3))], state)
    with pytest.raises(EngineError, match="cannot be forked"):
        llm.fork(state)
    with pytest.raises(EngineError, match="only the last"):
        llm.drop(state, 0)


def test_a_closed_one_says_so(here: Machine, tiny: Bundle, tiny_model: OmniModel) -> None:
    ids, mel = random_ids(tiny_model, 2), np.zeros((tiny_model.spec.front_end.n_mels, 4), np.float32)
    parts = {name: here.open(tiny, name) for name in COMPONENTS}
    state, stream = parts["llm"].start(1, 4), parts["codec"].open()
    codes = codes_of(tiny_model, 4)
    for part in parts.values():
        part.close(), part.close()
    calls: list[Callable[[], object]] = [
        lambda: parts["llm"].start(1, 4),
        lambda: parts["llm"].forward(ids, (), state),
        lambda: parts["encoder"].encode(mel),
        lambda: parts["codec"].decode(codes, stream, False),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="closed; open it again"):
            call()


# --- the calls of a frame


def test_a_frame_is_three_launches_and_copies_ids_alone(here: Machine, llm: Any, tiny_model: OmniModel) -> None:
    """Two rows: body, text logits of row 1, audio ids of row 0. One row and no text: body and audio ids."""
    layout, draws = tiny_model.spec.layout, np.zeros(tiny_model.spec.layout.streams)
    ids = random_ids(tiny_model, 4, rows=2)
    state = llm.start(2, 8)
    llm.forward(np.ascontiguousarray(ids[:1, :, :1]), (), state)
    llm.fork(state)
    body = "cudaGraphLaunch up engine on-device on-device down"
    text = ["cudaGraphLaunch engine", f"cudaMemcpyAsync down {4 * layout.text_vocab}", "cudaStreamSynchronize"]
    audio = ["cudaGraphLaunch engine", "cudaMemcpyAsync down 256", "cudaStreamSynchronize"]
    for rows, wanted in ((2, [body, *text, *audio]), (2, [body, *text, *audio]), (1, [body, *audio])):
        if rows == 1:
            llm.drop(state, 1)
        here.cuda.taken()
        hidden = llm.forward(np.ascontiguousarray(ids[:rows, :, :1]), (), state)
        if rows == 2:
            llm.text_logits(hidden, 1)
        llm.frame_ids(hidden, 0, 0, draws, GREEDY)
        assert [c for c in here.cuda.taken() if c != "cudaStreamSynchronize"] == [
            c for c in wanted if c != "cudaStreamSynchronize"
        ]


def test_a_fork_copies_the_frames_cached_and_no_more(here: Machine, llm: Any, tiny_model: OmniModel) -> None:
    body = tiny_model.spec.body
    state = llm.start(2, 8)
    llm.forward(random_ids(tiny_model, 5), (), state)
    here.cuda.taken()
    llm.fork(state)
    width, height = 5 * body.head_dim * 4, 2 * body.layers
    assert here.cuda.taken() == [f"cudaMemcpy2DAsync on-device {width}x{height}"] * body.kv_heads


def test_nothing_is_allocated_once_it_is_open(here: Machine, llm: Any, tiny_model: OmniModel) -> None:
    """The first turn finds everything prepared: caches, contexts, captured graphs."""
    here.cuda.taken()
    state = llm.start(2, 40)
    llm.forward(random_ids(tiny_model, 30), (), state)
    llm.fork(state)
    for rows in (2, 2, 1):
        hidden = llm.forward(random_ids(tiny_model, 1, rows=rows), (), state)
        llm.text_logits(hidden, rows - 1), llm.audio_logits(hidden, 0)
        if rows == 2 and state.length == 32:
            llm.drop(state, 1)
    calls = here.cuda.taken()
    assert not [c for c in calls if c.startswith(("cudaMalloc", "cudaHostAlloc", "cudaStreamBegin", "cudaFree"))]
    assert sum(c.startswith("execute_async_v3") for c in calls) == 1, "the prompt alone runs without a captured graph"


def test_where_capturing_fails_frames_run_as_they_are(
    tiny: Bundle, tiny_model: OmniModel, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = Recorder()
    cuda.failing["cudaStreamEndCapture"] = cuda.cudaError_t.cudaErrorStreamCaptureInvalidated
    with machine(cuda) as recorded:
        llm = recorded.open(tiny, "llm")
        assert "CUDA graphs are not used" in caplog.text
        contract.test_forked_rows_are_two_rows_and_the_last_can_go(llm, tiny_model)
        assert not [c for c in cuda.taken() if c.startswith("cudaGraphLaunch")]
        llm.close()
    assert cuda.leaks() == []


# --- encoder and codec


def test_the_encoder_gives_what_onnx_runtime_gives(here: Machine, tiny: Bundle, tiny_model: OmniModel) -> None:
    ours, theirs = here.open(tiny, "encoder"), with_ort(tiny, "encoder")
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
    ours.close()


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
    here: Machine, tiny: Bundle, tiny_model: OmniModel, sizes: tuple[int, ...], seed: int | None
) -> None:
    ours, theirs = here.open(tiny, "codec"), with_ort(tiny, "codec")
    codes = codes_of(tiny_model, sum(sizes))
    pairs = zip(pushed(ours, codes, sizes, seed), pushed(theirs, codes, sizes, seed), strict=True)
    total = 0
    for wave, expected in pairs:
        np.testing.assert_array_equal(wave, expected)
        total += len(wave)
    assert total == sum(sizes) * tiny_model.spec.codec.frame_samples
    ours.close()


def test_streams_of_several_sessions_take_turns(here: Machine, tiny: Bundle, tiny_model: OmniModel) -> None:
    """Each stream's states are moved out of the working memory while another one is at it."""
    ours, theirs = here.open(tiny, "codec"), with_ort(tiny, "codec")
    all_codes = [codes_of(tiny_model, 12, seed) for seed in range(3)]
    streams = [pushed(ours, codes, (4, 3, 5), i) for i, codes in enumerate(all_codes)]
    expected = [list(pushed(theirs, codes, (4, 3, 5), i)) for i, codes in enumerate(all_codes)]
    for at in range(3):
        for stream, waves in zip(streams, expected, strict=True):
            np.testing.assert_array_equal(next(stream), waves[at])
    before = here.cuda.used()
    del streams, stream
    streams = [pushed(ours, codes, (4, 3, 5), i) for i, codes in enumerate(all_codes)]
    for at in range(3):
        for stream, waves in zip(streams, expected, strict=True):
            np.testing.assert_array_equal(next(stream), waves[at])
    assert here.cuda.used() == before, "the memory of streams that are gone serves again"
    ours.close()


def test_a_usual_push_is_one_launch(here: Machine, tiny: Bundle, tiny_model: OmniModel) -> None:
    codec, sizes = here.open(tiny, "codec"), (4, 4, 4, 1)
    stream = pushed(codec, codes_of(tiny_model, sum(sizes)), sizes, None)
    next(stream)
    for _ in range(2):
        here.cuda.taken()
        next(stream)
        assert here.cuda.taken() == ["cudaGraphLaunch up engine on-device down", "cudaStreamSynchronize"]
    next(stream)
    codec.close()


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


def test_a_seeded_answer_is_onnx_runtime_s_to_the_sample(here: Machine, tiny: Bundle, tiny_model: OmniModel) -> None:
    """Sampled, two rows at first, codec noise on: ids and sound are the same."""
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    rule = Sampling(temperature=1.0, top_k=20, seed=3)
    ends, waves = [], []
    opened = Components(*(here.open(tiny, name) for name in COMPONENTS))
    for parts in (opened, Components(*(with_ort(tiny, name) for name in COMPONENTS))):
        session = Session(parts, tiny_model.spec, tiny_model.tokenizer_json)
        asked = {"audio": sound, "sample_rate": 16000, "sampling": rule, "max_length": 90, "noise_seed": 5}
        events = list(session.respond("aa", **asked))
        waves.append(np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)]))
        ends.append(events[-1])
    np.testing.assert_array_equal(ends[0].tokens, ends[1].tokens)
    assert len(waves[0]) > 4 * tiny_model.spec.codec.frame_samples
    np.testing.assert_array_equal(waves[0], waves[1])
    opened.close()


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
