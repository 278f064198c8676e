"""Prompts, each id written out by hand from the published forms (gpt-omni/mini-omni, inference.py).

The layout has three audio streams: strides (2, 1), a codebook of 10, 18 audio ids a stream, 100 text ids.
Text specials: eot 92, pad_t 93, input_t 94, answer_t 95, asr 96. Audio specials of stream 0 in the joint vocabulary:
eoa 110, pad_a 111, input_a 112, answer_a 113; stream 1 has them 18 higher, stream 2 36 higher.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from fakes import small_spec

from edgeomni.errors import PromptError
from edgeomni.prompts import Prompt, build

SPEC = small_spec(strides=(2, 1), codebook=10, history_turns=2)
EOT, PAD_T, INPUT_T, ANSWER_T, ASR = 92, 93, 94, 95, 96
EOA, PAD, INPUT, ANSWER = 110, 111, 112, 113


def row(first_stream: Sequence[int], text: Sequence[int]) -> list[list[int]]:
    """One row of ids: the other two audio streams hold what the first holds, 18 and 36 rows further on."""
    return [list(first_stream), [i + 18 for i in first_stream], [i + 36 for i in first_stream], list(text)]


def test_a_spoken_question_answered_in_speech() -> None:
    prompt = build(SPEC, "aa", features=3)
    spoken = row([INPUT, PAD, PAD, PAD, EOA, ANSWER], [INPUT_T, PAD_T, PAD_T, PAD_T, EOT, ANSWER_T])
    assert prompt.ids.tolist() == [spoken]
    assert (prompt.feature_start, prompt.length, prompt.rows) == (1, 6, 1)
    assert prompt.ids.dtype == np.int32


def test_the_second_row_asks_for_text_only() -> None:
    prompt = build(SPEC, "aa", features=2, two_row=True)
    text = [INPUT_T, PAD_T, PAD_T, EOT, ANSWER_T]
    assert prompt.ids.tolist() == [row([INPUT, PAD, PAD, EOA, ANSWER], text), row([INPUT, PAD, PAD, EOA, PAD], text)]
    assert (prompt.length, prompt.rows) == (5, 2)


@pytest.mark.parametrize(("task", "asked"), [("at", ANSWER_T), ("asr", ASR)])
def test_a_spoken_question_answered_in_text(task: str, asked: int) -> None:
    for two_row in (False, True):  # only the answer in speech has a second row
        prompt = build(SPEC, task, features=1, two_row=two_row)
        assert prompt.ids.tolist() == [row([INPUT, PAD, EOA, PAD], [INPUT_T, PAD_T, EOT, asked])]


@pytest.mark.parametrize(("task", "last"), [("ta", ANSWER), ("tt", PAD)])
def test_a_written_question(task: str, last: int) -> None:
    prompt = build(SPEC, task, text_ids=[5, 6], two_row=True)
    assert prompt.ids.tolist() == [row([PAD, PAD, PAD, PAD, last], [INPUT_T, 5, 6, EOT, ANSWER_T])]


def test_earlier_turns_stand_before_the_question_in_their_order() -> None:
    past = [([1, 2], [3]), ([4], [5, 6])]
    first = [INPUT_T, 1, 2, EOT, ANSWER_T, 3, EOT]
    second = [INPUT_T, 4, EOT, ANSWER_T, 5, 6, EOT]
    written = build(SPEC, "tt", text_ids=[7], history=past)
    assert written.ids.tolist() == [row([PAD] * 18, [*first, *second, INPUT_T, 7, EOT, ANSWER_T])]

    spoken = build(SPEC, "aa", features=2, two_row=True, history=past)
    text = [*first, *second, INPUT_T, PAD_T, PAD_T, EOT, ANSWER_T]
    assert spoken.ids.tolist() == [
        row([PAD] * 14 + [INPUT, PAD, PAD, EOA, ANSWER], text),
        row([PAD] * 14 + [INPUT, PAD, PAD, EOA, PAD], text),
    ]
    assert spoken.feature_start == 15, "14 frames of history and input_a come before the first feature"


def test_features_start_behind_input_a_by_default() -> None:
    assert Prompt(np.zeros((1, 4, 5), np.int32)).feature_start == 1


def test_as_many_turns_as_were_trained_and_no_more() -> None:
    turn = ([1], [2])
    assert build(SPEC, "tt", text_ids=[7], history=[turn] * 2).length == 16, (
        "six frames a turn and four of the question"
    )
    with pytest.raises(PromptError, match=r"3 turn\(s\) of history given.*trained with 2"):
        build(SPEC, "tt", text_ids=[7], history=[turn] * 3)


def test_ids_at_the_vocabulary_s_edges() -> None:
    assert build(SPEC, "tt", text_ids=[0, 99]).ids[0, -1].tolist() == [INPUT_T, 0, 99, EOT, ANSWER_T]
    for outside in (-1, 100):
        with pytest.raises(PromptError, match=rf"text ids \[{outside}\] lie outside the text vocabulary of 100"):
            build(SPEC, "tt", text_ids=[3, outside])
        for turn in (([outside], [1]), ([1], [2, outside])):
            with pytest.raises(PromptError, match=rf"text ids \[{outside}\] lie outside"):
                build(SPEC, "tt", text_ids=[3], history=[([1], [2]), turn])


def test_questions_that_are_none() -> None:
    assert build(SPEC, "at", features=1).length == 4
    with pytest.raises(PromptError, match="needs spoken audio"):
        build(SPEC, "at", text_ids=[1])
    with pytest.raises(PromptError, match="needs a question in text"):
        build(SPEC, "ta", features=3)
    with pytest.raises(PromptError, match="unknown task 'sing'; choose one of asr, at, aa, tt, ta"):
        build(SPEC, "sing", features=3)
    with pytest.raises(PromptError, match="not trained for task 'aa'; it knows asr, tt"):
        build(small_spec(tasks=("asr", "tt")), "aa", features=3)
