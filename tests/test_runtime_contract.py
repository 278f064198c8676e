"""What edgeomni/components.py promises of a language model, asked of every engine that runs here, in float32.

The truth is the OmniModel itself over whole rows at once, without a cache, pieces or streaming. The scripted fake
takes part where a promise needs no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines_here import WITH_FAKE, every, matches, random_features, random_ids, truth

from edgeomni.components import Components, Features
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import fake
from edgeomni.sampling import Sampling, choose_frame

HOT = Sampling(temperature=1.0, top_k=None)


@pytest.fixture
def llm(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].llm


# --- values


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
def test_the_first_and_the_last_id_have_rows(llm: Any, tiny_model: OmniModel) -> None:
    layout, ids = tiny_model.spec.layout, random_ids(tiny_model, 3)
    ids[0, -1] = [0, layout.text_vocab - 1, 0]
    ids[0, 0, 1:] = [layout.text_vocab, layout.text_vocab + layout.audio_vocab - 1]
    ids[0, -2, 2] = layout.joint_vocab - 1
    matches(llm, llm.forward(ids, (), llm.start(1, 3)), 0, truth(tiny_model, ids))


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


# --- forms and choices


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
    for array, copy, again in zip(kept, copies, [llm.text_logits(first, 0), llm.audio_logits(first, 0)], strict=True):
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
