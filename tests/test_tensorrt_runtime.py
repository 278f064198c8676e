"""TensorRT's adapters on recorded CUDA and TensorRT: what they answer, and the calls by which they do.

Engines compute their graphs, so that every number is compared with an independent one: the published code's tokens, the
OmniModel itself, or ONNX Runtime's own adapters on the same bundle. The recorder refuses calls that CUDA forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import test_runtime_contract as contract
from cuda_recorder import Recorder
from engines_here import matches, random_features, random_ids, truth
from tensorrt_parts import Machine, machine, with_ort, write_bundle

from edgeomni.bundle import Bundle
from edgeomni.components import Features
from edgeomni.engines import COMPONENTS
from edgeomni.errors import EngineError
from edgeomni.model.omni import OmniModel
from edgeomni.sampling import Sampling

GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def tiny(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "tiny")


@pytest.fixture
def half(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "half", "fp16")


@pytest.fixture(scope="module")
def here() -> Iterator[Machine]:
    """A recorded machine on which nothing may be left when all is closed."""
    with machine() as recorded:
        yield recorded
    assert recorded.cuda.leaks() == []
    assert len(recorded.tensorrt.living) == 0


@pytest.fixture(scope="module")
def llm(here: Machine, tiny: Bundle) -> Iterator[Any]:
    opened = here.open(tiny, "llm")
    yield opened
    opened.close()


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
    llm = parts["llm"]
    state, stream = llm.start(2, 4), parts["codec"].open()
    hidden = llm.forward(random_ids(tiny_model, 1), (), state)
    codes = [np.zeros(4 * n, np.int64) for n in tiny_model.spec.codec.ids_per_level]
    for part in parts.values():
        part.close(), part.close()
    calls: list[Callable[[], object]] = [
        lambda: llm.start(1, 4),
        lambda: llm.forward(ids, (), state),
        lambda: llm.text_logits(hidden, 0),
        lambda: llm.audio_logits(hidden, 0),
        lambda: llm.frame_ids(hidden, 0, 0, np.zeros(7), GREEDY),
        lambda: llm.frame_ids(hidden, 0, 0, np.zeros(7), Sampling()),
        lambda: llm.fork(state),
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
