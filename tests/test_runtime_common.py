"""What all engines' adapters share, by itself.

A turn's state, the mean of the streams, the encoder's window, the codec's edges, and what a file's opening says.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeomni.components import Features
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.runtimes.common.encoder_window import wanted_features
from edgeomni.runtimes.common.frame_embedding import mean_of_streams
from edgeomni.runtimes.common.graph_codec import edge_values
from edgeomni.runtimes.common.streaming_codec import Timing
from edgeomni.runtimes.common.trial import said_by
from edgeomni.runtimes.common.turn_state import TurnState, check_audio_row, check_start, taken


def ids(rows: int, frames: int) -> Any:
    return np.zeros((rows, 8, frames), np.int32)


# --- a turn's state


@pytest.mark.parametrize(
    ("rows", "frames", "told"),
    [
        (1, 1, ""),
        (1, 3, ""),
        (1, 4, "the cache holds 10 frames; 7 . 4 are too many"),
        (2, 1, r"ids have 2 row\(s\) of 1 frames, but 1 row\(s\) are active"),
        (0, 1, "ids have 0 row"),
        (1, 0, r"ids have 1 row\(s\) of 0 frames"),
    ],
)
def test_ids_that_a_state_takes(rows: int, frames: int, told: str) -> None:
    state = TurnState((), 10, 2, length=7)
    if not told:
        return state.check_ids(ids(rows, frames))
    with pytest.raises(EngineError, match=told):
        state.check_ids(ids(rows, frames))


def test_a_state_starts_empty_with_one_row() -> None:
    state = TurnState("caches", 10, 2)
    assert (state.caches, state.capacity, state.max_rows, state.length, state.rows) == ("caches", 10, 2, 0, 1)
    assert state != TurnState("caches", 10, 2), "two turns are never the same"


def test_rows_that_come_and_go() -> None:
    state = TurnState((), 10, 2)
    for row in (0, 1, -1):
        with pytest.raises(EngineError, match=f"only the last of several rows can be dropped, not row {row} of 1"):
            state.check_last(row)
    assert state.next_row() == 1
    state.rows = 2
    with pytest.raises(EngineError, match=r"was started for 2 row\(s\), so it cannot be forked"):
        state.next_row()
    state.check_last(1)
    with pytest.raises(EngineError, match="not row 0 of 2"):
        state.check_last(0)


@pytest.mark.parametrize(
    ("rows", "frames", "most_rows", "told"),
    [
        (1, 1, None, ""),
        (9, 40, None, ""),
        (1, 40, 2, ""),
        (2, 1, 2, ""),
        (1, 0, 2, "max_frames 0: this export holds 1 to 40 frames"),
        (1, 41, None, "max_frames 41: this export holds 1 to 40 frames"),
        (0, 1, 2, "a state has 1 to 2 rows, not 0"),
        (3, 1, 2, "a state has 1 to 2 rows, not 3"),
    ],
)
def test_how_large_a_state_can_be_started(rows: int, frames: int, most_rows: int | None, told: str) -> None:
    if not told:
        return check_start(rows, frames, 40, most_rows)
    with pytest.raises(EngineError, match=told):
        check_start(rows, frames, 40, most_rows)


def test_rows_that_have_audio() -> None:
    for row, rows in ((0, 1), (1, 2)):
        check_audio_row(row, rows)
    with pytest.raises(EngineError, match="row 1 has no audio logits"):
        check_audio_row(1, 1)


def test_the_first_spare_caches_that_fit_are_taken_and_the_others_stay() -> None:
    spare = deque([3, 8, 5, 9])
    assert taken(spare, lambda size: size >= 5) == 8
    assert sorted(spare) == [3, 5, 9]
    assert taken(spare, lambda size: size > 9) is None and sorted(spare) == [3, 5, 9]
    assert taken(deque[int](), lambda size: True) is None


def test_spare_caches_that_another_thread_takes_meanwhile() -> None:
    spare = deque([1, 2, 3])

    def fits(size: int) -> bool:
        spare.clear()
        return False

    assert taken(spare, fits) is None
    assert list(spare) == [1], "what did not fit is back; the other thread has the rest"


# --- embeddings


def test_the_mean_of_the_streams() -> None:
    """Counted by hand: eight streams, seven of them summed in `audio`; a feature counts seven times in their place."""
    audio, text = np.full((2, 3, 2), 7.0, np.float32), np.full((2, 3, 2), 9.0, np.float32)
    feature = np.array([[1, 2], [3, 4]], np.float32)
    mean = mean_of_streams(audio, text, 8, [Features(1, feature)])
    expected = [[2, 2], [(7 * 1 + 9) / 8, (7 * 2 + 9) / 8], [(7 * 3 + 9) / 8, (7 * 4 + 9) / 8]]
    np.testing.assert_array_equal(mean, [expected, expected])
    assert mean.flags.c_contiguous and mean.dtype == np.float32


@pytest.mark.parametrize(
    ("start", "shape"), [(-1, (1, 2)), (2, (2, 2)), (4, (1, 2)), (0, (4, 2)), (0, (1, 3)), (0, (1, 1))]
)
def test_features_that_do_not_fit(start: int, shape: tuple[int, int]) -> None:
    audio, text = np.zeros((1, 3, 2), np.float32), np.zeros((1, 3, 2), np.float32)
    with pytest.raises(EngineError, match="do not fit 3 positions of ids of width 2"):
        mean_of_streams(audio, text, 8, [Features(start, np.zeros(shape, np.float32))])


# --- the encoder's window

SPEC: Any = SimpleNamespace(front_end=SimpleNamespace(n_mels=4), encoder=SimpleNamespace(context=10))


@pytest.mark.parametrize(
    ("frames", "wanted", "computed"), [(2, None, 1), (20, None, 10), (20, 3, 3), (20, 10, 10), (8, 9, 4)]
)
def test_features_that_are_computed(frames: int, wanted: int | None, computed: int) -> None:
    assert wanted_features(np.zeros((4, frames), np.float32), wanted, SPEC) == computed


@pytest.mark.parametrize("shape", [(4, 0), (4, 1), (4, 3), (4, 22), (3, 4), (5, 4), (4,), (4, 4, 4), (1, 4, 4)])
def test_windows_that_no_encoder_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"takes log-mel \[4, t\] with t even, 2 to 20, not \[.*\]; split the audio"):
        wanted_features(np.zeros(shape, np.float32), None, SPEC)


# --- the codec's edges


def test_what_a_push_says_of_the_stream_s_edges() -> None:
    meta = {
        "tails": [{"name": "tail.a", "channels": 2, "length": 3}],
        "bounds": [
            {"name": "start.a", "push": "first", "then": 5, "otherwise": 0},
            {"name": "stop.a", "push": "last", "then": 9, "otherwise": -1},
        ],
    }
    for first, last, tail, start, stop in ((1, 0, 0, 5, -1), (0, 0, 0, 0, -1), (0, 1, 3, 0, 9), (1, 1, 3, 5, 9)):
        values = edge_values(meta, first, last)
        assert values["tail.a"].shape == (1, 2, tail) and not values["tail.a"].any()
        assert values["tail.a"].dtype == np.float32
        assert (values["start.a"].tolist(), values["stop.a"].tolist()) == ([start], [stop])
        assert values["start.a"].dtype == values["stop.a"].dtype == np.int64


def test_a_codec_s_timing_is_what_its_meta_says() -> None:
    meta = {
        "first_push": 3,
        "push_multiple": 8,
        "lag_samples": 700,
        "noise": [{"scale": 8, "lag": 5}, {"scale": 64, "lag": 9}],
    }
    assert Timing.of(meta) == Timing(3, 8, 700, ((8, 5), (64, 9)))


# --- files opened in a process of their own


def test_what_an_engine_says_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> None:
        raise EngineError("no such graph")

    assert said_by(lambda: None) == 0 and capsys.readouterr().err == ""
    assert said_by(refused) == 1 and capsys.readouterr().err == "no such graph\n"


@pytest.mark.parametrize(
    ("kind", "code"), [("package", 4), ("device", 4), ("memory", 4), ("version", 4), ("graph", 1), ("damaged", 1)]
)
def test_a_machine_that_lacks_something_says_nothing_against_a_file(kind: Any, code: int) -> None:
    def lacking() -> None:
        raise EngineUnavailable(kind, "not here")

    assert said_by(lacking) == code
