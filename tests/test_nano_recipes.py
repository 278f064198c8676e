"""The recipes of nano's data, judged without edgeomni.data's own checks: what is held out, voices, words, answers."""

from __future__ import annotations

import re
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from edgeomni.data import espeak
from edgeomni.data.recipe_files import load_recipe
from edgeomni.data.synth_plan import Plan, planned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(espeak.__file__).with_name("recipes")
SPOKEN = {"nano": "en-us", "nano-es": "es"}
TESTS = {"nano": ["test", "test-noisy", "test-arguments"], "nano-es": ["test", "test-arguments"]}
NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
NUMEROS = ["cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez"]


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Every question of the recipes as `edgeomni data synth` speaks it, not spoken."""
    return {name: planned(load_recipe(name), language) for name, language in SPOKEN.items()}


def document(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def patterns(recipe: dict[str, Any], key: str) -> list[tuple[str, re.Pattern[str]]]:
    """Topic and pattern of each wording: a slot is any words, an opening may stand before."""
    openings = "|".join(f"{re.escape(opening)} " for opening in recipe["openings"] if opening)
    found = []
    for topic in recipe["topics"]:
        for template in topic.get(key, []):
            parts = [re.escape(part) for part in re.split(r"\{\w+\}", template)]
            found.append((topic["name"], re.compile(f"(?:{openings})?" + "(.+)".join(parts))))
    return found


def texts(plan: Plan, split: str) -> set[str]:
    return {sample.question.text for sample in plan[split]}


def words(found: set[str]) -> set[str]:
    return {word for text in found for word in text.split()}


@pytest.mark.parametrize("name", SPOKEN)
def test_no_question_in_a_new_wording_is_in_training(name: str, plans: dict[str, Plan]) -> None:
    seen = texts(plans[name], "train")
    held = [(topic, wording) for topic, wording in patterns(document(name), "unseen_questions")]
    assert len(held) >= 6 and len({topic for topic, _ in held}) >= 0.8 * (len(document(name)["topics"]) - 1)
    for split in TESTS[name]:
        asked = texts(plans[name], split)
        assert not asked & seen, sorted(asked & seen)[:3]
        if split != "test-arguments":
            assert all(any(wording.fullmatch(text) for _, wording in held) for text in asked)


@pytest.mark.parametrize("name", SPOKEN)
def test_every_word_of_a_held_out_question_and_answer_is_learnt(name: str, plans: dict[str, Plan]) -> None:
    learnt = words(texts(plans[name], "train"))
    answers = words({sample.question.answer for sample in plans[name]["train"]})
    for split in TESTS[name]:
        assert words(texts(plans[name], split)) <= learnt
        said = words({sample.question.answer for sample in plans[name][split]})
        # The answer to held-out arguments may be one that no other question has: its words are then heard, not said.
        assert said <= (answers | learnt if split == "test-arguments" else answers)


@pytest.mark.parametrize("name", SPOKEN)
def test_no_voice_of_a_test_is_in_training(name: str, plans: dict[str, Plan]) -> None:
    heard = {sample.speech.voice for sample in plans[name]["train"]}
    assert len(heard) > 40
    never = re.compile(r".*\+(whisper.*|croak|Demonic|Tweaky|kaukovalta)")
    for split in TESTS[name]:
        new = {sample.speech.voice for sample in plans[name][split]}
        assert len(new) == 5 and not new & heard
    assert not [voice for voice in heard if never.fullmatch(voice)]


def pairs(found: set[str], numbers: list[str], signs: tuple[str, ...]) -> dict[str, set[tuple[int, int]]]:
    """Sign -> the pairs of numbers that stand around it in questions."""
    word = "|".join(numbers)
    pattern = re.compile(rf"\b({word}) ({'|'.join(signs)}) ({word})\b")
    pairs: dict[str, set[tuple[int, int]]] = {sign: set() for sign in signs}
    for text in found:
        for first, sign, second in pattern.findall(text):
            pairs[sign].add((numbers.index(first), numbers.index(second)))
    return pairs


def test_one_in_eight_pairs_of_numbers_is_never_learnt(plans: dict[str, Plan]) -> None:
    """Sums are held out with their mirror images, differences by themselves."""
    learnt = pairs(texts(plans["nano"], "train"), NUMBERS, ("plus", "minus", "less than"))
    asked = pairs(texts(plans["nano"], "test-arguments"), NUMBERS, ("plus", "minus", "less than"))
    for sign in asked:
        assert asked[sign] and not asked[sign] & learnt[sign], sign
    assert not {(b, a) for a, b in asked["plus"]} & learnt["plus"]
    possible = {(a, b) for a, b in product(range(21), range(13)) if 0 <= a - b <= 12}
    assert len(learnt["minus"]) / len(possible) == pytest.approx(7 / 8, abs=0.03)
    possible = {(a, b) for a, b in product(range(13), repeat=2) if a + b <= 20}
    assert len(learnt["plus"]) / len(possible) == pytest.approx(7 / 8, abs=0.03)


def test_pairs_of_numbers_in_spanish_are_held_out_too(plans: dict[str, Plan]) -> None:
    learnt = pairs(texts(plans["nano-es"], "train"), NUMEROS, ("más", "y"))
    asked = pairs(texts(plans["nano-es"], "test-arguments"), NUMEROS, ("más", "y"))
    unordered = [{tuple(sorted(pair)) for sign in found for pair in found[sign]} for found in (learnt, asked)]
    assert unordered[1] and not unordered[0] & unordered[1]


def right_answer(a: int, sign: str, b: int) -> str:
    """What is to be answered, worked out by Python's own arithmetic."""
    if sign == "less than":
        return "yes that is right" if a < b else "no that is wrong"
    return f"the answer is {NUMBERS[a + b if sign == 'plus' else a - b]}"


def test_the_answers_are_right(plans: dict[str, Plan]) -> None:
    """Sums, differences and comparisons computed here; one answer for each question in all splits together."""
    answers: dict[str, str] = {}
    for split in plans["nano"].values():
        for sample in split:
            assert answers.setdefault(sample.question.text, sample.question.answer) == sample.question.answer
    word, checked = "|".join(NUMBERS), Counter[str]()
    for text, answer in answers.items():
        if not (found := re.search(rf"\b({word}) (plus|minus|less than) ({word})\b", text) or less(text, word)):
            continue
        first, sign, second = NUMBERS.index(found[1]), found[2], NUMBERS.index(found[3])
        assert answer == right_answer(first, sign.removeprefix("is "), second), text
        checked[sign.removeprefix("is ")] += 1
    assert checked.keys() == {"plus", "minus", "less than"} and min(checked.values()) > 200


def less(text: str, word: str) -> re.Match[str] | None:
    return re.search(rf"\b({word}) (is less than) ({word})\b", text)


def test_answers_are_a_closed_set_of_some_hundreds_and_each_is_learnt(plans: dict[str, Plan]) -> None:
    answers = {split: {sample.question.answer for sample in plans["nano"][split]} for split in plans["nano"]}
    assert 200 <= len(answers["train"]) <= 500
    assert answers["test"] <= answers["train"] and answers["test-noisy"] <= answers["train"]
    spoken = {sample.question.answer for sample in plans["nano"]["test-arguments"]} - answers["train"]
    assert all(len(answer.split()) == 2 for answer in spoken)  # "repeat after me" with a pair that is new
    assert all(re.fullmatch("[a-z ]+", answer) for answer in answers["train"])


def test_the_noisy_test_is_at_10_db_and_the_others_are_clean() -> None:
    splits = load_recipe("nano").splits
    assert splits["test-noisy"].recording is not None
    assert (splits["test-noisy"].recording.noise_share, splits["test-noisy"].recording.snr_db) == (1.0, (10, 10))
    assert all(splits[name].recording is None for name in splits if name != "test-noisy")
    assert load_recipe("nano").recording.noise_share == 0


def test_every_answer_is_in_the_voice_that_the_judge_hears_best() -> None:
    voices = [load_recipe(name).answer_voice for name in ("nano", "nano-voice", "nano-es")]
    assert voices[0] == voices[1] == voices[2]
    assert (voices[0].voice, voices[0].rate_wpm) == ("{language}+robosoft", 145)


def test_nanos_voice_says_exactly_nanos_words(plans: dict[str, Plan]) -> None:
    said = words({t for split in plans["nano"] for t in texts(plans["nano"], split)}) | words(
        {sample.question.answer for split in plans["nano"].values() for sample in split}
    )
    listed = document("nano-voice")["lists"]["word"]
    assert listed == sorted(set(listed))
    assert set(listed) == said


def test_nanos_voice_says_every_word_and_its_formulas_reach_the_whole_list() -> None:
    plan = planned(load_recipe("nano-voice"), "en-us")
    listed = document("nano-voice")["lists"]["word"]
    counts = Counter(word for sample in plan["train"] for word in sample.question.answer.split())
    assert set(counts) == set(listed)
    lengths = {
        int(n)
        for formula in document("nano-voice")["topics"][0]["then"].values()
        for n in [formula.split("% ")[1][:-1]]
    }
    assert lengths == {len(listed)}


@pytest.mark.parametrize(("name", "shortest", "longest"), [("nano-words", 2, 5), ("nano-phrases", 6, 10)])
def test_words_in_any_order_are_nanos_words_by_its_voices_and_hold_no_question_of_a_test(
    name: str, shortest: int, longest: int, plans: dict[str, Plan]
) -> None:
    plan = planned(load_recipe(name), "en-us")["train"]
    said = [sample.question.text for sample in plan]
    assert {len(text.split()) for text in said} == set(range(shortest, longest + 1))
    assert words(set(said)) >= words({text for split in plans["nano"] for text in texts(plans["nano"], split)})
    heard = {sample.speech.voice for sample in plan}
    held_out = {text for split in TESTS["nano"] for text in texts(plans["nano"], split) if len(text.split()) > 2}
    runs = {" ".join(w[i : i + n]) for w in map(str.split, said) for n in range(3, 11) for i in range(len(w) - n + 1)}
    assert not runs & held_out
    for split in TESTS["nano"]:
        assert not heard & {sample.speech.voice for sample in plans["nano"][split]}
    # Any order: a word is followed by a tenth of all others or so, not by a few.
    after = {b for w in map(str.split, said) for a, b in zip(w, w[1:], strict=False) if a == "the"}
    assert len(after) > 25
