"""The promises of edgeomni/components.py, asked of every engine that runs here, on one tiny model in float32.

The truth is the OmniModel itself over whole rows at once, without a cache, pieces or streaming. The scripted fake
takes part where a promise needs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeomni.components import Components, Features
from edgeomni.errors import EdgeOmniError, EngineError
from edgeomni.exporters import load
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import fake
from edgeomni.runtimes.onnxruntime.codec import OrtCodec
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory
from edgeomni.runtimes.torch import components_of
from edgeomni.sampling import Sampling, choose_frame

ENGINES = ["torch", "ort", "portable"]
WITH_FAKE = [*ENGINES, "fake"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
HOT = Sampling(temperature=1.0, top_k=None)


@pytest.fixture(scope="module")
def opened(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Components]:
    """Each engine's components, opened once."""
    layout = tiny_model.spec.layout
    scripted = [[(5 * i + k) % layout.codebook_size for k in range(layout.streams)] + [i] for i in range(60)]
    return {
        "torch": components_of(tiny_model),
        "ort": exported(tiny_model, tmp_path_factory.mktemp("ort"), "ort"),
        "portable": exported(tiny_model, tmp_path_factory.mktemp("portable"), "portable"),
        "fake": fake.components(tiny_model.spec, scripted),
    }


def exported(model: OmniModel, out: Path, flavour: str) -> Components:
    parts = {}
    for name, opens in (("encoder", OrtEncoder), ("llm", OrtLanguageModel), ("codec", OrtCodec)):
        component = load("onnx").export(model, name, out, "fp32", flavour=flavour)
        parts[name] = opens(out, component, model.spec, SessionFactory(1))  # type: ignore[operator]
    return Components(**parts)


@pytest.fixture
def llm(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].llm


@pytest.fixture
def encoder(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].encoder


@pytest.fixture
def codec(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].codec


def every(part: str, engines: Sequence[str] = ENGINES) -> Any:
    return pytest.mark.parametrize(part, engines, indirect=True)


def random_ids(model: OmniModel, frames: int, seed: int = 0, rows: int = 1) -> np.ndarray:
    rng, layout = np.random.default_rng(seed), model.spec.layout
    audio = [rng.integers(0, layout.audio_vocab, (rows, frames)) + layout.shift(k) for k in range(layout.streams)]
    return np.stack([*audio, rng.integers(0, layout.text_vocab, (rows, frames))], 1).astype(np.int32)


def random_features(model: OmniModel, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, model.spec.body.width)).astype(np.float32)


def truth(model: OmniModel, ids: np.ndarray, features: Sequence[Features] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Text logits [T, text_vocab] and audio logits [T, K, audio_vocab] of one row, all positions at once."""
    given = [(f.start, torch.from_numpy(f.values)) for f in features]
    with torch.no_grad():
        text, audio = model(torch.from_numpy(ids).long(), given)
    return text[0].numpy(), audio[0].numpy()


def matches(llm: Any, hidden: Any, row: int, expected: tuple[np.ndarray, np.ndarray], at: int = -1) -> None:
    """The hidden's logits of that row are those of position `at` of the truth."""
    np.testing.assert_allclose(llm.text_logits(hidden, row), expected[0][at], **CLOSE)
    np.testing.assert_allclose(llm.audio_logits(hidden, row), expected[1][at], **CLOSE)


# --- the language model: values


@every("llm")
@pytest.mark.parametrize("pieces", [(9,), (1, 8), (8, 1), (3, 3, 3), (1,) * 9])
def test_pieces_are_the_whole(llm: Any, tiny_model: OmniModel, pieces: tuple[int, ...]) -> None:
    ids = random_ids(tiny_model, 9)
    expected, state, at = truth(tiny_model, ids), llm.start(1, 9), 0
    for n in pieces:
        hidden = llm.forward(np.ascontiguousarray(ids[:, :, at : at + n]), (), state)
        at += n
        matches(llm, hidden, 0, expected, at - 1)


@every("llm")
def test_a_long_prompt_with_features_through_its_middle(llm: Any, tiny_model: OmniModel) -> None:
    """Longer than what any engine appends at once, the features lying across that border."""
    ids, given = random_ids(tiny_model, 270), [Features(1, random_features(tiny_model, 260))]
    matches(llm, llm.forward(ids, given, llm.start(1, 270)), 0, truth(tiny_model, ids, given))


@every("llm")
@pytest.mark.parametrize(
    "cuts",
    [
        [(2, 2, 5)],
        [(2, 2, 3), (3, 3, 5)],  # one after the other, without a gap
        [(3, 3, 5), (2, 2, 3)],  # in another order
        [(2, 2, 3), (3, 3, 4), (4, 4, 5)],
    ],
)
def test_several_segments_are_one(llm: Any, tiny_model: OmniModel, cuts: list[tuple[int, int, int]]) -> None:
    """Features 0 to 2 stand at positions 2 to 4; (start, from, to) cuts them by position."""
    ids, values = random_ids(tiny_model, 7), random_features(tiny_model, 3)
    expected = truth(tiny_model, ids, [Features(2, values)])
    given = [Features(start, values[first - 2 : last - 2]) for start, first, last in cuts]
    matches(llm, llm.forward(ids, given, llm.start(1, 7)), 0, expected)


@every("llm")
@pytest.mark.parametrize("starts", [(0,), (5,), (0, 5), (1, 4)])
def test_segments_anywhere(llm: Any, tiny_model: OmniModel, starts: tuple[int, ...]) -> None:
    """The truth embeds each frame by hand: K times the feature and the text's embedding, over K + 1."""
    ids = random_ids(tiny_model, 7)
    given = [Features(start, random_features(tiny_model, 2, start)) for start in starts]
    table, k = tiny_model.embedding.weight.detach().numpy(), tiny_model.spec.layout.streams
    embeds = table[ids[0]].sum(0)
    for segment in given:
        for i, value in enumerate(segment.values):
            embeds[segment.start + i] = k * value + table[ids[0, -1, segment.start + i]]
    with torch.no_grad():
        hidden, _ = tiny_model.hidden(torch.from_numpy(embeds / (k + 1))[None])
        expected = tiny_model.text_logits(hidden)[0].numpy(), tiny_model.audio_logits(hidden)[0].numpy()
    matches(llm, llm.forward(ids, given, llm.start(1, 7)), 0, expected)


@every("llm")
def test_segments_count_from_the_ids_given_and_hold_for_every_row(llm: Any, tiny_model: OmniModel) -> None:
    ids, values = random_ids(tiny_model, 6, rows=2), random_features(tiny_model, 2)
    ids[1, :, :4] = ids[0, :, :4]
    state = llm.start(2, 6)
    llm.forward(np.ascontiguousarray(ids[:1, :, :4]), [], state)
    llm.fork(state)
    hidden = llm.forward(np.ascontiguousarray(ids[:, :, 4:]), [Features(0, values)], state)
    for row in (0, 1):
        matches(llm, hidden, row, truth(tiny_model, ids[row : row + 1], [Features(4, values)]))


@every("llm")
def test_forked_rows_are_two_rows_and_the_last_can_go(llm: Any, tiny_model: OmniModel) -> None:
    ids = random_ids(tiny_model, 9, rows=2)
    ids[1, :, :4] = ids[0, :, :4]
    expected, state = [truth(tiny_model, ids[row : row + 1]) for row in (0, 1)], llm.start(2, 9)
    llm.forward(np.ascontiguousarray(ids[:1, :, :4]), (), state)
    llm.fork(state)
    for at in range(4, 7):
        hidden = llm.forward(np.ascontiguousarray(ids[:, :, at : at + 1]), (), state)
        for row in (0, 1):
            matches(llm, hidden, row, expected[row], at)
    llm.drop(state, 1)
    for at in range(7, 9):
        matches(llm, llm.forward(np.ascontiguousarray(ids[:1, :, at : at + 1]), (), state), 0, expected[0], at)


@every("llm")
def test_states_do_not_meet(llm: Any, tiny_model: OmniModel) -> None:
    """Three turns side by side: one row, two rows, and one that starts while the others are under way."""
    ids = [random_ids(tiny_model, 6, seed) for seed in (1, 2, 3)]
    expected = [truth(tiny_model, i) for i in ids]
    states = [llm.start(1, 6), llm.start(2, 8)]
    for at in range(3):
        for i, state in enumerate(states):
            matches(llm, llm.forward(ids[i][:, :, at : at + 1].copy(), (), state), 0, expected[i], at)
    llm.fork(states[1])
    states.append(llm.start(1, 6))
    matches(llm, llm.forward(ids[2], (), states[2]), 0, expected[2])
    both = np.concatenate([ids[1][:, :, 3:], ids[1][:, :, 3:]])
    hidden = llm.forward(both, (), states[1])
    matches(llm, hidden, 0, expected[1])
    matches(llm, hidden, 1, expected[1])
    matches(llm, llm.forward(ids[0][:, :, 3:].copy(), (), states[0]), 0, expected[0])


# --- the language model: forms and choices


@every("llm", WITH_FAKE)
def test_what_the_heads_give(llm: Any, tiny_model: OmniModel) -> None:
    layout = tiny_model.spec.layout
    hidden = llm.forward(random_ids(tiny_model, 2), (), llm.start(1, 2))
    text, audio = llm.text_logits(hidden, 0), llm.audio_logits(hidden, 0)
    assert (text.shape, audio.shape) == ((layout.text_vocab,), (layout.streams, layout.audio_vocab))
    assert text.dtype == audio.dtype == np.float32 and text.flags.c_contiguous and audio.flags.c_contiguous
    ids = llm.frame_ids(hidden, 0, 3, np.zeros(layout.streams), Sampling(greedy=True))
    assert ids.shape == (layout.streams,) and ids.dtype == np.int64
    given = llm.audio_logits(hidden, 0, np.arange(layout.streams))
    np.testing.assert_array_equal(given, audio)


@every("llm", WITH_FAKE)
def test_frames_are_chosen_as_the_logits_say(llm: Any, tiny_model: OmniModel) -> None:
    streams = tiny_model.spec.layout.streams
    state = llm.start(2, 8)
    llm.forward(random_ids(tiny_model, 4), (), state)
    llm.fork(state)
    hidden = llm.forward(random_ids(tiny_model, 1, 5, rows=2), (), state)
    for row in (0, 1):
        logits = llm.audio_logits(hidden, row)
        greedy = llm.frame_ids(hidden, row, 7, np.full(streams, 0.99), Sampling(greedy=True))
        np.testing.assert_array_equal(greedy, logits.argmax(-1))
        for seed in range(3):
            draws = np.random.default_rng(seed).random(streams)
            np.testing.assert_array_equal(llm.frame_ids(hidden, row, 7, draws, HOT), choose_frame(logits, draws, HOT))


@every("llm", WITH_FAKE)
def test_the_caller_keeps_what_it_was_given(llm: Any, tiny_model: OmniModel) -> None:
    """Arrays stay as they were while the engine runs on, and so does what an earlier hidden says."""
    ids, state = random_ids(tiny_model, 6), llm.start(1, 6)
    first = llm.forward(ids[:, :, :3].copy(), (), state)
    kept = [llm.text_logits(first, 0), llm.audio_logits(first, 0)]
    copies = [array.copy() for array in kept]
    for at in range(3, 6):
        hidden = llm.forward(ids[:, :, at : at + 1].copy(), (), state)
        llm.text_logits(hidden, 0), llm.audio_logits(hidden, 0)
    for array, copy, again in zip(
        kept, copies, [llm.text_logits(first, 0), llm.audio_logits(first, 0)], strict=True
    ):
        np.testing.assert_array_equal(array, copy)
        np.testing.assert_array_equal(again, copy)
    assert any(not np.array_equal(llm.audio_logits(hidden, 0), c) for c in copies[1:])


@every("llm", WITH_FAKE)
def test_a_single_frame_s_hidden_outlives_the_next_one(llm: Any, tiny_model: OmniModel) -> None:
    """A decode step may run in buffers that the next one uses again."""
    ids, state = random_ids(tiny_model, 4), llm.start(1, 4)
    hiddens = [llm.forward(ids[:, :, at : at + 1].copy(), (), state) for at in range(4)]
    late = [llm.text_logits(h, 0) for h in hiddens]
    fresh = llm.start(1, 4)
    for at in range(4):
        hidden = llm.forward(ids[:, :, at : at + 1].copy(), (), fresh)
        if not isinstance(llm, fake.FakeLanguageModel):
            np.testing.assert_array_equal(llm.text_logits(hidden, 0), late[at])
    assert len({array.tobytes() for array in late}) == 4


@every("llm", WITH_FAKE)
def test_the_caller_s_arrays_are_left_alone(llm: Any, tiny_model: OmniModel) -> None:
    ids, values = random_ids(tiny_model, 5), random_features(tiny_model, 2)
    before = ids.copy(), values.copy()
    llm.forward(ids, [Features(1, values)], llm.start(1, 5))
    for array, was in zip((ids, values), before, strict=True):
        np.testing.assert_array_equal(array, was)


# --- the language model: what it refuses


@every("llm", WITH_FAKE)
def test_a_state_takes_exactly_its_frames(llm: Any, tiny_model: OmniModel) -> None:
    ids = random_ids(tiny_model, 5)
    for pieces in ([5], [4, 1], [1, 4]):
        state, at = llm.start(1, 5), 0
        for n in pieces:
            llm.forward(ids[:, :, at : at + n].copy(), (), state)
            at += n
        with pytest.raises(EngineError):
            llm.forward(ids[:, :, :1].copy(), (), state)
    with pytest.raises(EngineError):
        llm.forward(ids, (), llm.start(1, 4))
    state = llm.start(1, 5)
    llm.forward(ids[:, :, :3].copy(), (), state)
    with pytest.raises(EngineError):
        llm.forward(ids[:, :, :3].copy(), (), state)


@every("llm", WITH_FAKE)
def test_rows_are_those_that_are_active(llm: Any, tiny_model: OmniModel) -> None:
    one, two = random_ids(tiny_model, 1), random_ids(tiny_model, 1, rows=2)
    state = llm.start(2, 8)
    with pytest.raises(EngineError):
        llm.forward(two, (), state)
    llm.forward(one, (), state)
    llm.fork(state)
    with pytest.raises(EngineError):
        llm.forward(one, (), state)
    llm.forward(two, (), state)
    llm.drop(state, 1)
    with pytest.raises(EngineError):
        llm.forward(two, (), state)
    llm.forward(one, (), state)


@every("llm", WITH_FAKE)
def test_forks_need_room(llm: Any, tiny_model: OmniModel) -> None:
    single, double = llm.start(1, 8), llm.start(2, 8)
    for state in (single, double):
        llm.forward(random_ids(tiny_model, 1), (), state)
    with pytest.raises(EngineError):
        llm.fork(single)
    llm.fork(double)
    with pytest.raises(EngineError):
        llm.fork(double)


@every("llm", WITH_FAKE)
def test_only_the_last_row_can_be_dropped_and_never_row_0(llm: Any, tiny_model: OmniModel) -> None:
    state = llm.start(2, 8)
    llm.forward(random_ids(tiny_model, 1), (), state)
    for row in (-1, 0, 1):  # of one active row
        with pytest.raises(EngineError):
            llm.drop(state, row)
    llm.fork(state)
    for row in (-1, 0, 2):
        with pytest.raises(EngineError):
            llm.drop(state, row)
    llm.drop(state, 1)
    with pytest.raises(EngineError):
        llm.drop(state, 1)


@every("llm", WITH_FAKE)
@pytest.mark.parametrize(("start", "count"), [(-1, 2), (3, 2), (4, 1), (0, 5)])
def test_features_that_do_not_fit_are_refused(llm: Any, tiny_model: OmniModel, start: int, count: int) -> None:
    given = [Features(start, random_features(tiny_model, count))]
    with pytest.raises(EngineError):
        llm.forward(random_ids(tiny_model, 4), given, llm.start(1, 8))
    with pytest.raises(EngineError):  # the second of two
        llm.forward(random_ids(tiny_model, 4), [Features(0, random_features(tiny_model, 1)), *given], llm.start(1, 8))


@every("llm", WITH_FAKE)
@pytest.mark.parametrize("stream", [0, -2, -1])
def test_ids_without_a_row_are_refused(llm: Any, tiny_model: OmniModel, stream: int) -> None:
    for bad in (-1, tiny_model.spec.layout.joint_vocab):
        ids = random_ids(tiny_model, 3)
        ids[0, stream, 1] = bad
        with pytest.raises(EngineError):
            llm.forward(ids, (), llm.start(1, 8))


@every("llm", WITH_FAKE)
def test_ids_of_no_frames_are_refused(llm: Any, tiny_model: OmniModel) -> None:
    with pytest.raises(EngineError):
        llm.forward(random_ids(tiny_model, 0), (), llm.start(1, 8))


@every("llm", WITH_FAKE)
def test_an_error_leaves_the_engine_usable(llm: Any, tiny_model: OmniModel) -> None:
    ids, bad = random_ids(tiny_model, 3), random_ids(tiny_model, 3)
    bad[0, 0, 0] = -1
    with pytest.raises(EngineError):
        llm.forward(bad, (), llm.start(1, 3))
    hidden = llm.forward(ids, (), llm.start(1, 3))
    if not isinstance(llm, fake.FakeLanguageModel):
        matches(llm, hidden, 0, truth(tiny_model, ids))


# --- the encoder


def random_mel(model: OmniModel, t: int) -> np.ndarray:
    return np.random.default_rng(t).standard_normal((model.spec.front_end.n_mels, t)).astype(np.float32)


@every("encoder")
@pytest.mark.parametrize("t", [2, 64, 300])
def test_one_feature_for_two_mel_frames(encoder: Any, tiny_model: OmniModel, t: int) -> None:
    mel = random_mel(tiny_model, t)
    with torch.no_grad():
        expected = tiny_model.encode(torch.from_numpy(mel)[None])[0].numpy()
    got = encoder.encode(mel)
    assert got.shape == (t // 2, tiny_model.spec.body.width) and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, **CLOSE)
    for wanted in (1, t // 2, t // 2 + 5):
        np.testing.assert_allclose(encoder.encode(mel, wanted), expected[:wanted], **CLOSE)


@every("encoder")
def test_features_may_be_kept(encoder: Any, tiny_model: OmniModel) -> None:
    mel = random_mel(tiny_model, 20)
    first = encoder.encode(mel)
    copy = first.copy()
    assert not np.array_equal(encoder.encode(-mel), copy)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(mel, random_mel(tiny_model, 20))


@every("encoder")
def test_windows_that_do_not_fit_are_refused(encoder: Any, tiny_model: OmniModel) -> None:
    for t in (0, 3, 2 * tiny_model.spec.encoder.context + 2):
        with pytest.raises(EdgeOmniError):
            encoder.encode(random_mel(tiny_model, t))


# --- the codec


def random_codes(model: OmniModel, frames: int, seed: int = 0) -> list[np.ndarray]:
    rng, spec = np.random.default_rng(seed), model.spec.codec
    return [rng.integers(0, spec.codebook_size, frames * n) for n in spec.ids_per_level]


def part(model: OmniModel, codes: list[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
    return [c[start * n : stop * n] for c, n in zip(codes, model.spec.codec.ids_per_level, strict=True)]


def offline(model: OmniModel, codes: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model.decode_codes([torch.from_numpy(c)[None] for c in codes]).numpy()


@every("codec")
@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 0), (3, 1, 2, 4), (3, 1, 1, 1, 0), (9,)])
def test_joined_pushes_are_the_offline_decode(codec: Any, tiny_model: OmniModel, sizes: tuple[int, ...]) -> None:
    assert (codec.first_push, codec.push_multiple) == (3, 1)
    total = sum(sizes)
    codes, state, at = random_codes(tiny_model, total, total), codec.open(), 0
    pieces = []
    for i, n in enumerate(sizes):
        pieces.append(codec.decode(part(tiny_model, codes, at, at + n), state, i == len(sizes) - 1))
        at += n
        assert pieces[-1].dtype == np.float32 and pieces[-1].ndim == 1 and pieces[-1].flags.writeable
    assert sum(map(len, pieces)) == total * tiny_model.spec.codec.frame_samples
    np.testing.assert_allclose(np.concatenate(pieces), offline(tiny_model, codes), **CLOSE)


@every("codec")
def test_streams_do_not_meet_and_samples_may_be_kept(codec: Any, tiny_model: OmniModel) -> None:
    """The listener may even write on them, as silence is written on them."""
    codes = [random_codes(tiny_model, 7, seed) for seed in (1, 2)]
    states, heard, copies = [codec.open(), codec.open()], [[], []], [[], []]  # type: ignore[var-annotated]
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        for i in (0, 1):
            samples = codec.decode(part(tiny_model, codes[i], start, stop), states[i], stop == 7)
            heard[i].append(samples)
            copies[i].append(samples.copy())
    for i in (0, 1):
        np.testing.assert_array_equal(np.concatenate(heard[i]), np.concatenate(copies[i]))
        np.testing.assert_allclose(np.concatenate(heard[i]), offline(tiny_model, codes[i]), **CLOSE)
    samples[:] = 0
    again = codec.decode(codes[1], codec.open(), True)
    np.testing.assert_allclose(again, offline(tiny_model, codes[1]), **CLOSE)


@every("codec")
def test_noise_is_off_unless_seeded_and_the_same_for_a_seed(codec: Any, tiny_model: OmniModel) -> None:
    codes = random_codes(tiny_model, 5)
    clean, one, again, two = (codec.decode(codes, codec.open(seed), True) for seed in (None, 1, 1, 2))
    np.testing.assert_allclose(clean, offline(tiny_model, codes), **CLOSE)
    np.testing.assert_array_equal(one, again)
    assert len({a.tobytes() for a in (clean, one, two)}) == 3
    state = codec.open(1)
    pieces = [codec.decode(part(tiny_model, codes, a, b), state, b == 5) for a, b in ((0, 3), (3, 5))]
    np.testing.assert_allclose(np.concatenate(pieces), one, **CLOSE)


@every("codec", WITH_FAKE)
def test_a_stream_that_has_ended_takes_nothing_more(codec: Any, tiny_model: OmniModel) -> None:
    codes, state = random_codes(tiny_model, 3), codec.open()
    codec.decode(codes, state, True)
    for last in (False, True):
        with pytest.raises(EngineError):
            codec.decode(codes, state, last)
    with pytest.raises(EngineError):
        codec.decode(part(tiny_model, codes, 0, 0), state, True)


@every("codec", WITH_FAKE)
def test_levels_that_do_not_fit_together_are_refused(codec: Any, tiny_model: OmniModel) -> None:
    codes = random_codes(tiny_model, 3)
    for level in range(3):
        wrong = [c[:-1] if i == level else c for i, c in enumerate(codes)]
        with pytest.raises(EngineError):
            codec.decode(wrong, codec.open(), True)
    for wrong in (codes[:-1], [*codes, codes[0]]):
        with pytest.raises(EngineError):
            codec.decode(wrong, codec.open(), True)
