"""Scores of single answers and pooled figures, against numbers that were counted by hand."""

from __future__ import annotations

import pytest

from edgeomni.evaluate import metrics
from edgeomni.evaluate.metrics import Share


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Hello,  World!", "hello world"),
        (" Don't — “go” ", "dont go"),
        ("it’s o'clock", "its oclock"),
        ("twenty-one", "twenty one"),
        ("ＡＢＣ１２", "abc12"),
        ("¿Qué tal, señor?", "qué tal señor"),
        ("你好，世界。", "你好 世界"),
        ("हिन्दी।", "हिन्दी"),
        ("5 + 3 = $8", "5 + 3 = $8"),
        ("ÄRGER\t\nSTRASSE", "ärger strasse"),
        ("…", ""),
        ("", ""),
    ],
)
def test_texts_are_compared_as_plain_words(text: str, plain: str) -> None:
    assert metrics.normalised(text) == plain
    assert metrics.normalised(plain) == plain


def test_characters_without_spaces_are_tokens_of_their_own() -> None:
    assert metrics.tokens("东京 is 2 big, ねこ!") == ["东", "京", "is", "2", "big", "ね", "こ"]
    assert metrics.tokens("สวัสดี") == list("สวัสดี")


@pytest.mark.parametrize(
    ("reference", "text", "wer", "cer"),
    [
        ("the cat sat", "The cat sat.", (0, 3), (0, 9)),
        ("the cat sat", "the bat sat down", (2, 3), (5, 9)),  # c -> b; and d, o, w, n
        ("the cat sat", "cat", (2, 3), (6, 9)),
        ("the cat sat", "", (3, 3), (9, 9)),
        ("one", "one two three four", (3, 1), (12, 3)),
        ("你好世界", "你好 世间", (2, 1), (1, 4)),  # one word becomes two others; one character of four is wrong
    ],
)
def test_word_and_character_errors(reference: str, text: str, wer: tuple[int, int], cer: tuple[int, int]) -> None:
    assert metrics.wer(reference, text) == wer
    assert metrics.cer(reference, text) == cer


@pytest.mark.parametrize(
    ("reference", "text", "f1"),
    [
        ("the answer is twelve", "The answer is twelve!", 1.0),
        ("the answer is twelve", "twelve", 0.4),  # precision 1, recall 1/4
        ("a a b", "a b b", 2 / 3),  # a once, b once in common
        ("twelve", "thirteen", 0.0),
        ("twelve", "", 0.0),
        ("东京", "京都", 0.5),
    ],
)
def test_token_f1(reference: str, text: str, f1: float) -> None:
    found = metrics.f1(reference, text)
    assert found.got == pytest.approx(f1) and found.of == 1


def test_exact_is_of_the_whole_text() -> None:
    assert metrics.exact("Is it so?", "is it so") == (1, 1)
    assert metrics.exact("is it so", "is it") == (0, 1)


def test_each_task_has_its_figures() -> None:
    assert metrics.written("asr", "a b", "a") == {"wer": (1, 2), "cer": (1, 2)}
    for task in ("at", "aa", "tt", "ta"):
        assert metrics.written(task, "a b", "a") == {"exact": (0, 1), "f1": (pytest.approx(2 / 3), 1)}
    assert metrics.spoken("floor", "a b", "a") == {"floor_exact": (0, 1), "floor_wer": (1, 2), "floor_cer": (1, 2)}


def test_errors_are_pooled_over_words_and_not_over_sentences() -> None:
    scores = [{"wer": Share(1, 1)}, {"wer": Share(0, 9), "exact": Share(1, 1)}]
    assert metrics.pooled(scores) == {"wer": (1, 10), "exact": (1, 1)}


def test_which_figures_are_better_when_less() -> None:
    names = {"wer": True, "cer": True, "heard_wer": True, "ceiling_cer": True, "exact": False, "f1": False}
    assert {name: metrics.less_is_better(name) for name in [*names, "heard_exact"]} == {**names, "heard_exact": False}
