"""Frames of every task, held against frames written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from training import small_spec

from edgeomni import prompts
from edgeomni.errors import DataError
from edgeomni.spec import CodecSpec, OmniSpec, TokenLayout
from edgeomni.train.frames import IGNORED, answer_frames, frames_of, padding

# Three streams (strides 2, 1), 20 words + 6 specials, codebook of 10 with 5 specials; written out by hand below:
# text rows 0..25: eot 20, pad_t 21, input_t 22, answer_t 23, asr 24; audio rows 15 per stream from 26, 41, 56 on:
# eoa 10, pad_a 11, input_a 12, answer_a 13.
LAYOUT = TokenLayout(26, 15, 10, 3, 6)
CODEC = CodecSpec("snac", 16000, 10, (2, 1), 256)
X = IGNORED
CODES = np.array([[1, 2, 3], [4, 5, 6]])
"""Two codec frames."""


@pytest.fixture
def spec() -> OmniSpec:
    return small_spec(layout=LAYOUT, codec=CODEC)


def columns(*rows: str) -> np.ndarray:
    return np.array([[X if cell == "x" else int(cell) for cell in row.split()] for row in rows])


def test_asr_learns_the_transcript_and_nothing_else(spec: OmniSpec) -> None:
    made = frames_of(LAYOUT, "asr", prompts.build(spec, "asr", features=2), [7, 8])
    assert made.feature_start == 1
    assert (
        made.ids.tolist()
        == columns(
            # input_a pad pad eoa pad | answer: pad pad
            "38 37 37 36 37 37 37",
            "53 52 52 51 52 52 52",
            "68 67 67 66 67 67 67",
            # input_t pad_t pad_t eot asr | 7 8
            "22 21 21 20 24 7 8",
        ).tolist()
    )
    assert (
        made.labels.tolist()
        == columns(
            "x x x x x x x",
            "x x x x x x x",
            "x x x x x x x",
            "x x x x 7 8 20",
        ).tolist()
    )


def test_at_differs_from_asr_in_its_mark_alone(spec: OmniSpec) -> None:
    asr = frames_of(LAYOUT, "asr", prompts.build(spec, "asr", features=2), [7, 8])
    at = frames_of(LAYOUT, "at", prompts.build(spec, "at", features=2), [7, 8])
    assert (asr.labels == at.labels).all()
    assert np.argwhere(asr.ids != at.ids).tolist() == [[3, 4]] and at.ids[3, 4] == 23


def test_aa_speaks_along_the_diagonal_and_ends_with_the_last_streams_eoa(spec: OmniSpec) -> None:
    made = frames_of(LAYOUT, "aa", prompts.build(spec, "aa", features=1), [7], CODES)
    # The answer's frames 0..5: stream k holds pad_a to frame k, its codes, eoa, pad_a.
    assert (
        made.labels.tolist()
        == columns(
            "x x x 11 1 4 10 11 11",
            "x x x 11 11 2 5 10 11",
            "x x x 11 11 11 3 6 10",
            "x x x 7 20 x x x x",
        ).tolist()
    )
    assert (
        made.ids.tolist()
        == columns(
            "38 37 36 39 37 27 30 36 37",
            "53 52 51 54 52 52 43 46 51",
            "68 67 66 69 67 67 67 59 62",
            "22 21 20 23 7 20 21 21 21",
        ).tolist()
    )


def test_ta_asks_in_writing(spec: OmniSpec) -> None:
    made = frames_of(LAYOUT, "ta", prompts.build(spec, "ta", text_ids=[5, 6]), [7], CODES)
    assert (
        made.ids[:, :5].tolist()
        == columns("37 37 37 37 39", "52 52 52 52 54", "67 67 67 67 69", "22 5 6 20 23").tolist()
    )
    assert made.labels[:, :4].tolist() == [[X] * 4] * 4
    assert (
        made.labels[:, 4:].tolist()
        == columns("11 1 4 10 11 11", "11 11 2 5 10 11", "11 11 11 3 6 10", "7 20 x x x x").tolist()
    )


def test_tt_keeps_the_audio_streams_silent_and_out_of_the_loss(spec: OmniSpec) -> None:
    made = frames_of(LAYOUT, "tt", prompts.build(spec, "tt", text_ids=[5]), [7, 9])
    assert (
        made.ids.tolist()
        == columns("37 37 37 37 37 37", "52 52 52 52 52 52", "67 67 67 67 67 67", "22 5 20 23 7 9").tolist()
    )
    assert made.labels.tolist() == [[X] * 6] * 3 + columns("x x x 7 9 20").tolist()


def test_a_system_prompt_moves_everything_behind_it(spec: OmniSpec) -> None:
    plain = frames_of(LAYOUT, "aa", prompts.build(spec, "aa", features=1), [7], CODES)
    made = frames_of(LAYOUT, "aa", prompts.build(spec, "aa", features=1, system_ids=[1, 2]), [7], CODES)
    assert made.feature_start == 3
    assert made.ids[:, 2:].tolist() == plain.ids.tolist() and made.ids[3, :2].tolist() == [1, 2]
    assert made.labels[:, 2:].tolist() == plain.labels.tolist() and (made.labels[:, :2] == X).all()


@pytest.mark.parametrize("task", ["asr", "at", "aa", "ta", "tt"])
def test_the_number_of_answer_frames_is_what_is_labelled(task: str, spec: OmniSpec) -> None:
    asked = {"features": 3} if task in ("asr", "at", "aa") else {"text_ids": [5]}
    prompt = prompts.build(spec, task, **asked)  # type: ignore[arg-type]
    codes = CODES if task in ("aa", "ta") else None
    made = frames_of(LAYOUT, task, prompt, [7, 8], codes)
    labelled = int((made.labels != X).any(0).sum())
    assert answer_frames(LAYOUT, task, 2, 2) == labelled == made.length - prompt.length + 1


def test_the_padding_is_a_frame_of_pads() -> None:
    assert padding(LAYOUT).tolist() == [[37], [52], [67], [21]]


@pytest.mark.parametrize(
    ("answer", "codes", "message"),
    [
        ([7], None, "no sound"),
        ([7], np.zeros((0, 3), np.int64), "no sound"),
        ([7], np.array([[1, 2]]), "2 ids from 1 to 2 do not fit a codec with 3"),
        ([7], np.array([[1, 2, 10]]), "to 10 do not fit"),
        ([7], np.array([[1, -1, 3]]), "from -1"),
        ([7, 8, 9, 7, 8], CODES, "6 ids with its end, but its sound of 2 codec frames ends after 5"),
        ([20], CODES, r"\[20\] lie outside the 20 words"),
        ([-1], CODES, r"\[-1\]"),
    ],
)
def test_answers_that_cannot_be_learned_are_refused(
    spec: OmniSpec, answer: list[int], codes: np.ndarray | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        frames_of(LAYOUT, "aa", prompts.build(spec, "aa", features=1), answer, codes)


def test_the_longest_text_that_its_sound_covers_is_taken(spec: OmniSpec) -> None:
    made = frames_of(LAYOUT, "aa", prompts.build(spec, "aa", features=1), [7, 8, 9, 7], CODES)
    assert made.labels[3, 3:].tolist() == [7, 8, 9, 7, 20, X]


def test_the_first_and_the_last_ids_are_taken(spec: OmniSpec) -> None:
    codes = np.array([[0, 9, 0], [9, 0, 9]])
    made = frames_of(LAYOUT, "aa", prompts.build(spec, "aa", features=1), [0, 19], codes)
    assert (
        made.labels[:, 3:].tolist()
        == columns("11 0 9 10 11 11", "11 11 9 0 10 11", "11 11 11 0 9 10", "0 19 20 x x x").tolist()
    )
