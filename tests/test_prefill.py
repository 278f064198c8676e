"""The prompt goes into the LLM by pieces: their borders, the features across them, and a cancel between them."""

from __future__ import annotations

import numpy as np
import pytest
from turns import SPEC, Turn, plain

from edgeomni.components import Features, features_between
from edgeomni.generate import Stop
from edgeomni.prefill import PREFILL_FRAMES, prefill
from edgeomni.runtimes import fake

# --- the prompt in pieces

P = PREFILL_FRAMES


@pytest.mark.parametrize(
    ("length", "pieces"),
    [(1, [1]), (P - 1, [P - 1]), (P, [P]), (P + 1, [P, 1]), (2 * P, [P, P]), (2 * P + 5, [P, P, 5])],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_goes_in_by_pieces(length: int, pieces: list[int], rows: int) -> None:
    """With two rows all but the last position are shared; that one comes after them, in both rows."""
    whole = length + (rows == 2)
    ids = np.zeros((rows, 4, whole), np.int32) + np.array([[100], [118], [136], [0]], np.int32)
    ids[:, 3] = np.arange(whole) % 90
    ids[rows - 1, 0, -1] = 111
    llm = fake.FakeLanguageModel(SPEC, [[0, 0, 0, 0]])
    state = llm.start(rows, whole)
    hidden = prefill(llm, ids, (), state)
    assert isinstance(hidden, fake.FakeHidden) and hidden.rows == rows
    assert [f.shape for f in state.fed[: len(pieces)]] == [(1, 4, n) for n in pieces]
    shared = np.concatenate(state.fed[: len(pieces)], axis=2)
    np.testing.assert_array_equal(shared, ids[:1, :, :length])
    assert len(state.fed) == len(pieces) + (rows == 2)
    if rows == 2:
        np.testing.assert_array_equal(state.fed[-1], ids[:, :, -1:])


@pytest.mark.parametrize(
    ("start", "count"), [(1, 3), (1, P - 1), (1, P), (P, 1), (P - 1, 2), (3, 2 * P), (0, 2 * P + 5)]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_features_reach_their_own_positions_across_pieces(start: int, count: int, rows: int) -> None:
    length = 2 * P + 5
    ids = np.zeros((rows, 4, length), np.int32) + np.array([[100], [118], [136], [0]], np.int32)
    values = np.repeat(np.arange(1, count + 1, dtype=np.float32)[:, None], SPEC.body.width, axis=1)
    llm = fake.FakeLanguageModel(SPEC, [[0, 0, 0, 0]])
    state = llm.start(rows, length)
    prefill(llm, ids, [Features(start, values)], state)
    seen, position = np.zeros(length), 0
    for fed, segments in zip(state.fed, state.features, strict=True):
        for segment in segments:
            seen[position + segment.start : position + segment.stop] = segment.values[:, 0]
        position += fed.shape[2]
    expected = np.zeros(length)
    expected[start : start + count] = np.arange(1, count + 1)
    np.testing.assert_array_equal(seen, expected)


def test_features_between_its_edges() -> None:
    """Features 0, 1, 2 at positions 5, 6, 7, and one more at position 10."""
    segments = [Features(5, np.array([[0.0], [1.0], [2.0]])), Features(10, np.array([[3.0]]))]

    def cut(start: int, stop: int) -> list[tuple[int, list[float]]]:
        return [(s.start, s.values[:, 0].tolist()) for s in features_between(segments, start, stop)]

    assert cut(0, 20) == [(5, [0, 1, 2]), (10, [3])]
    assert cut(5, 8) == [(0, [0, 1, 2])]
    assert cut(6, 7) == [(0, [1])]
    assert cut(4, 6) == [(1, [0])]
    assert cut(7, 11) == [(0, [2]), (3, [3])]
    assert cut(0, 5) == cut(8, 10) == cut(11, 30) == cut(6, 6) == []


def test_cancel_while_the_prompt_goes_in() -> None:
    """`cancelled` is asked before each piece: two pieces went in, the third and the answer are left out."""
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    turn = Turn(plain([1], 9), cancelled=cancelled, features=3 * P)
    assert turn.events == [Stop("cancelled", 0, 0.0)]
    assert [f.shape[2] for f in turn.llm.kept[0].fed] == [P, P] and len(asked) == 3
    assert turn.codec.pushes == []
