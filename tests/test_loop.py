"""The loop without a Session: what each frame is fed, when the answer stops, and which ids reach the codec."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import small_spec
from turns import EOA, EOT, PAD_A, PAD_ROWS, PAD_T, SPEC, Turn, plain

from edgeomni import generate as loop
from edgeomni.errors import PromptError
from edgeomni.generate import Frame, Options, Samples, Stop

# --- what the LLM is fed


def test_each_frame_is_fed_what_the_last_one_chose() -> None:
    frames = [[1, 2, 3, 40], [4, 5, 6, 41], [7, 8, 9, EOT], [0, 1, 2, 50], [3, 4, 5, 51], [6, 7, EOA, 52]]
    state = Turn(frames).llm.kept[0]
    steps = [ids[:, :, 0].tolist() for ids in state.fed[2:]]  # after the prompt's shared part and its last position
    assert steps == [
        [[101, 120, 139, 40], [*PAD_ROWS, 40]],
        [[104, 123, 142, 41], [*PAD_ROWS, 41]],
        [[107, 126, 145, EOT]],  # its text has ended, so row 1 goes
        [[100, 119, 138, PAD_T]],
        [[103, 122, 141, PAD_T]],
    ]
    assert all(not given for given in state.features[2:]), "features belong to the prompt alone"


def test_one_row_is_fed_and_asked_alone() -> None:
    turn = Turn([[1, 2, 3, 40], [4, 5, 6, EOT], [7, 8, EOA, 1]], two_row=False)
    assert [ids[:, :, 0].tolist() for ids in turn.llm.kept[0].fed[1:]] == [
        [[101, 120, 139, 40]],
        [[104, 123, 142, EOT]],
    ]
    assert turn.llm.kept[0].max_rows == 1 and turn.text == [40, EOT]


def test_text_tasks_feed_pad_a() -> None:
    turn = Turn([[1, 2, 3, 40], [1, 2, 3, 41], [1, 2, 3, EOT]], task="at")
    assert [ids[:, :, 0].tolist() for ids in turn.llm.kept[0].fed[1:]] == [[[*PAD_ROWS, 40]], [[*PAD_ROWS, 41]]]
    assert turn.text == [40, 41] and turn.stop == Stop("eot", 0, turn.stop.busy_s)
    assert [f.audio.tolist() for f in turn.frames] == [[PAD_A] * 3] * 2
    assert turn.llm.chosen == [] and turn.codec.seeds == [], "nobody asked the audio heads or the codec"


def test_next_ids_written_out() -> None:
    one = loop.next_ids(SPEC.layout, np.array([0, 9, EOA]), 77, rows=1)
    assert one.tolist() == [[[100], [127], [146], [77]]] and one.dtype == np.int32
    two = loop.next_ids(SPEC.layout, np.array([0, 9, EOA]), 77, rows=2)
    assert two.tolist() == [[[100], [127], [146], [77]], [[111], [129], [147], [77]]]


# --- stopping


def test_only_the_last_stream_s_eoa_ends_the_answer() -> None:
    frames = [[1, 2, 3, 40], [EOA, 5, 6, 41], [7, EOA, 9, 42], [7, 8, EOA, 43], [1, 1, 1, 44]]
    turn = Turn(frames)
    assert turn.stop.reason == "eoa"
    assert [f.audio.tolist() for f in turn.frames] == [[1, 2, 3], [EOA, 5, 6], [7, EOA, 9]]


def test_the_frame_with_eoa_is_not_emitted_even_where_its_text_ends_too() -> None:
    turn = Turn([[1, 2, 3, 40], [4, 5, 6, 41], [7, 8, EOA, EOT]])
    assert turn.stop.reason == "eoa" and turn.text == [40, 41]


def test_the_prefill_s_frame_is_tested_by_no_rule() -> None:
    turn = Turn([[1, 2, EOA, EOT], [4, 5, 6, 41], [7, 8, 9, EOT], [1, 1, 1, 44], [1, 1, EOA, 44]])
    assert turn.text == [EOT, 41, EOT, PAD_T] and turn.frames[0].audio.tolist() == [1, 2, EOA]
    written = Turn([[1, 2, 3, EOT], [4, 5, 6, 41], [7, 8, 9, EOT]], task="tt")
    assert written.text == [EOT, 41] and written.stop.reason == "eot"


def test_eot_does_not_end_speech_and_eoa_does_not_end_text() -> None:
    spoken = Turn(plain([1], 30))
    assert spoken.stop.reason == "eoa" and spoken.text == [1, EOT] + [PAD_T] * 28
    written = Turn([[1, 2, EOA, 40], [1, 2, EOA, 41], [1, 2, 3, EOT]], task="tt")
    assert written.stop.reason == "eot" and written.text == [40, 41]


@pytest.mark.parametrize(
    ("most", "frames"), [(8, 1), (9, 2), (20, 13), (299, 292), (300, 293), (301, 293), (None, 293)]
)
def test_max_length_counts_prompt_and_answer_and_never_exceeds_the_context(most: int | None, frames: int) -> None:
    """The prompt takes 4 + 3 frames, and the context has 300."""
    turn = Turn(plain([1], 400, eoa=False), options=Options(max_length=most))
    assert (turn.stop.reason, len(turn.frames)) == ("length", frames)
    assert turn.llm.kept[0].max_frames == min(most or 300, 300)


def test_a_prompt_that_fills_everything_is_refused() -> None:
    assert len(Turn(plain([1], 400), options=Options(max_length=8)).frames) == 1
    with pytest.raises(PromptError, match=r"prompt takes 7 frames, and 7 are allowed in all \(context 300\)"):
        Turn(plain([1], 400), options=Options(max_length=7))
    with pytest.raises(PromptError, match="prompt takes 301 frames, and 300 are allowed"):
        Turn(plain([1], 400), features=298)


def test_an_answer_cut_by_its_length_still_gives_its_audio() -> None:
    turn = Turn(plain([1], 400, eoa=False), options=Options(max_length=7 + 10))
    assert len(turn.samples) == (10 - 3) * SPEC.codec.frame_samples and turn.codec.lasts[-1] is True


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_cancelled_turn_flushes_no_audio(after: int) -> None:
    """Cancelled while frame `after` was listened to: no frame and no sample comes any more."""
    heard: list[Frame] = []
    turn = Turn(
        plain([1], 30),
        cancelled=lambda: len(heard) == after,
        on_event=lambda e: heard.append(e) if isinstance(e, Frame) else None,
    )
    assert turn.stop.reason == "cancelled" and len(turn.frames) == after
    assert True not in turn.codec.lasts and sum(turn.codec.pushes) <= max(0, after - 3)
    assert isinstance(turn.events[-2], Frame if after < 6 else Frame | Samples)


def test_silent_frames_are_counted_in_the_stop() -> None:
    frames = plain([1], 12)
    frames[4][0] = EOA  # stream 0 of LLM frame 4 is codec frame 3
    frames[9][2] = PAD_A  # stream 2 of LLM frame 9 is codec frame 6
    turn = Turn(frames)
    by_frame = turn.samples.reshape(-1, SPEC.codec.frame_samples)
    assert turn.stop.silent_frames == 2
    assert [i for i, wave in enumerate(by_frame) if not wave.any()] == [3, 6]


# --- the delay pattern


@pytest.mark.parametrize("strides", [(1,), (1, 1, 1), (2, 1), (4, 2, 1), (8, 4, 2, 1)])
def test_codec_frames_are_read_along_the_diagonal(strides: tuple[int, ...]) -> None:
    """Stream k of codec frame f stands in LLM frame f + k + 1, whatever the layout."""
    spec = small_spec(strides=strides, codebook=997, context=100)
    k = spec.layout.streams
    frames = [[31 * i + s for s in range(k)] + [1] for i in range(k + 6)]
    frames.append([0] * (k - 1) + [spec.layout.eoa, 1])
    turn = Turn(frames, spec=spec)
    expected = [[31 * (f + s + 1) + s for s in range(k)] for f in range(6)]
    levels = spec.codec.level_of_stream
    for level, pushed in enumerate(turn.codec.codes):
        ids = [[frame[s] for s in range(k) if levels[s] == level] for frame in expected]
        np.testing.assert_array_equal(np.concatenate(pushed), np.concatenate(ids))
