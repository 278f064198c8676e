"""Recipes: templates written out against hand-made lists, formulas, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeomni.data.recipe import Recipe
from edgeomni.data.recipe_files import load_recipe, parse_recipe, recipe_names
from edgeomni.data.slots import Formula, fill, slots_of
from edgeomni.data.synth_plan import check_disjoint, planned
from edgeomni.data.synth_questions import read_lines, written_out
from edgeomni.errors import DataError, UsageError

GOOD = """
title = "two topics"
openings = ["", "please"]
[lists]
number = ["zero", "one", "two", "three"]
day = ["monday", "tuesday", "wednesday"]
[question_voice]
voices = ["{language}"]
unseen = ["{language}+f2"]
[[topics]]
name = "sum"
each = { a = "number", b = "number" }
where = "a + b <= 2 and a > 0"
then = { c = "number[a + b]" }
questions = ["what is {a} plus {b}"]
unseen_questions = ["add {a} and {b}"]
answer = "it is {c}"
unseen_arguments = 3
[[topics]]
name = "capital"
columns = ["land", "city"]
rows = [["france", "paris"], ["spain", "madrid"]]
questions = ["the capital of {land}"]
answer = "{city}"
[splits.train]
samples = 20
[splits.test]
samples = 5
new = ["voices", "wordings"]
"""


def recipe(text: str = GOOD) -> Recipe:
    return parse_recipe(text.encode(), "mine.toml")


def test_templates_are_written_out_as_by_hand() -> None:
    found = {(q.text, q.answer, q.new_wording) for q in written_out(recipe())}
    assert found == {
        ("what is one plus zero", "it is one", False),
        ("what is one plus one", "it is two", False),
        ("what is two plus zero", "it is two", False),
        ("please what is one plus zero", "it is one", False),
        ("please what is one plus one", "it is two", False),
        ("please what is two plus zero", "it is two", False),
        ("add one and zero", "it is one", True),
        ("add one and one", "it is two", True),
        ("add two and zero", "it is two", True),
        ("please add one and zero", "it is one", True),
        ("please add one and one", "it is two", True),
        ("please add two and zero", "it is two", True),
        ("the capital of france", "paris", False),
        ("please the capital of france", "paris", False),
        ("the capital of spain", "madrid", False),
        ("please the capital of spain", "madrid", False),
    }


def test_every_third_argument_is_held_out_in_all_its_wordings() -> None:
    held = {q.arguments for q in written_out(recipe()) if q.new_arguments}
    assert len(held) == 1 and held < {("one", "zero"), ("one", "one"), ("two", "zero")}
    assert sum(q.new_arguments for q in written_out(recipe())) == 4  # two wordings with two openings each


def test_unordered_arguments_are_held_out_with_their_mirror_image() -> None:
    text = GOOD.replace("a + b <= 2 and a > 0", "a + b <= 3").replace(
        "unseen_arguments = 3", "unseen_arguments = 3\nunordered = true"
    )
    sums = [q for q in written_out(recipe(text)) if q.topic == "sum" and q.text.startswith("what")]
    held = {frozenset(re.findall("zero|one|two|three", q.text)) for q in sums if q.new_arguments}
    free = {frozenset(re.findall("zero|one|two|three", q.text)) for q in sums if not q.new_arguments}
    assert held and not held & free
    assert len(held) == 2  # of 0+0, 0+1, 0+2, 0+3, 1+1, 1+2: every third


def test_what_is_held_out_depends_neither_on_the_order_of_rows_nor_on_the_seed() -> None:
    rows = ["[" + ", ".join(f'["land{i}", "city{i}"]' for i in order) + "]" for order in (range(9), range(8, -1, -1))]
    held = []
    for text in rows:
        text = re.sub(r"rows = .*", f"rows = {text}\nunseen_arguments = 3", GOOD)
        held.append({q.arguments for q in written_out(recipe(text)) if q.topic == "capital" and q.new_arguments})
    assert held[0] == held[1] and len(held[0]) == 3


def test_numbers_without_a_list_are_written_as_digits() -> None:
    text = GOOD.replace('c = "number[a + b]"', 'c = "10 * a + b"')
    assert {q.answer for q in written_out(recipe(text)) if q.topic == "sum"} == {"it is 10", "it is 11", "it is 20"}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("a + b * 2", 13),
        ("(a + b) * 2", 16),
        ("a - b", -2),
        ("-a + 4", 1),
        ("b // 2 + b % 3", 4),
        ("day[(a + 1) % 3]", "tuesday"),
        ("day[a < b]", "tuesday"),
        ("a < b < 6", 1),
        ("a < b < 5", 0),
        ("a >= 3 and not b != 5", 1),
        ("a > 3 or b <= 4", 0),
        ("a == 3 or b == 7", 1),
        ("max(a, b) - min(a, b, 1)", 4),
    ],
)
def test_formulas_compute(formula: str, value: int | str) -> None:
    assert Formula.parse(formula).value({"a": 3, "b": 5}, {"day": ["monday", "tuesday", "wednesday"]}) == value


@pytest.mark.parametrize(
    ("formula", "named"),
    [
        ("a +", "no formula"),
        ("", "no formula"),
        ("c + 1", "no argument 'c'"),
        ("day[3]", "index 3 is outside the list 'day', which has 3 words"),
        ("day[0 - 1]", "index -1 is outside"),
        ("month[0]", "no list 'month'"),
        ("a // 0", "divides by zero"),
        ("a ** 9", "its only operators"),
        ("a.real", "only numbers"),
        ("__import__('os')", "only numbers"),
        ("max()", "takes numbers"),
        ("(lambda: 1)()", "only numbers"),
        ("day[day[0]]", "only numbers"),
        ("1.5", "only numbers"),
        ("True", "only numbers"),
        ("a * 1000000 * 1000000", "too large"),
        ("1+" * 120 + "1", "too long"),
    ],
)
def test_formulas_that_make_no_sense_are_refused(formula: str, named: str) -> None:
    with pytest.raises(DataError, match=re.escape(named)):
        Formula.parse(formula).value({"a": 3}, {"day": ["monday", "tuesday", "wednesday"]})


def test_slots_are_filled_once() -> None:
    assert slots_of("{a} and {b} and {a}") == ["a", "b", "a"]
    assert fill("{a} and {b}", {"a": "{b}", "b": "x"}) == "{b} and x"
    with pytest.raises(DataError, match=r"slot \{c\} that nothing fills; known are a"):
        fill("{c}", {"a": "x"})


BAD = {
    'title = "two topics"': ('titel = "x"', r"unknown key\(s\) \$.titel"),
    'number = ["zero", "one", "two", "three"]': ("number = []", r"\$.lists.number"),
    'questions = ["what is {a} plus {b}"]': ("questions = []", r"\$.topics\[0\].questions"),
    '["what is {a} plus {b}"]': (
        '["what is {a} plus {x}"]',
        r"\$.topics\[0\].questions\[0\]: nothing fills the slot \{x\}",
    ),
    '["add {a} and {b}"]': ('["add {a and {b}"]', r"\$.topics\[0\].unseen_questions\[0\]: .* brace"),
    'answer = "it is {c}"': ('answer = "{d}"', r"\$.topics\[0\].answer: nothing fills the slot \{d\}"),
    'each = { a = "number", b = "number" }': (
        'each = { a = "number", b = "digit" }',
        r"each: there is no list 'digit'",
    ),
    'where = "a + b <= 2 and a > 0"': ('where = "a +"', r"\$.topics\[0\].where: 'a \+' is no formula"),
    '["spain", "madrid"]': ('["spain"]', r"\$.topics\[1\].rows\[1\]: has 1 words for 2 columns"),
    'columns = ["land", "city"]': ("", r"columns and rows need one another"),
    'name = "capital"': ('name = "sum"', r"\$.topics: two topics have the same name"),
    'answer = "{city}"': ('answer = "{city}"\nwhere = "1"', "where and then need each"),
    '[question_voice]\nvoices = ["{language}"]': ("[question_voice]\nvoices = []", r"\$.question_voice.voices"),
    'unseen = ["{language}+f2"]': ("", r"\$.splits.test.new: nothing in the recipe holds out voices"),
    "unseen_arguments = 3": ("unseen_arguments = 1", r"\$.topics\[0\].unseen_arguments"),
    "[splits.train]": ("[splits.training]", r'\$.splits: there must be a split "train"'),
    "samples = 20": ("samples = 0", r"\$.splits.train.samples"),
    'new = ["voices", "wordings"]': ("", r"\$.splits.test.new: must name what is new"),
    '["voices", "wordings"]': ('["speakers"]', r"\$.splits.test.new\[0\]"),
    "[splits.test]": ('[splits."Te/st"]', "small letters"),
    'unseen = ["{language}+f2"]\n': (
        'unseen = ["{tongue}+f2"]\n',
        r"\$.question_voice.unseen\[0\]: nothing fills the slot \{tongue\}",
    ),
    '["{language}"]\n': (
        '["{language}"]\nrate_wpm = [200, 100]\n',
        r"\$.question_voice.rate_wpm: \[200, 100\] must be a range",
    ),
    '["{language}"]\nunseen': ('["{language}"]\npitch = [0, 100]\nunseen', r"\$.question_voice.pitch"),
    '["{language}"]\nunseen =': ('["{language}"]\nunseen_rate_wpm = [190, 220]\nunseen =', "overlaps rate_wpm"),
    "[lists]": ("[recording]\nnoise_share = 2\n[lists]", r"\$.recording.noise_share"),
    "[lists]\n": ("[recording]\nsnr_db = [30, 10]\n[lists]\n", r"\$.recording.snr_db"),
    "samples = 5": ("samples = 5\nrecording = { before_s = [0, 99] }", r"\$.splits.test.recording.before_s"),
    "openings": ("tasks = []\nopenings", r"\$.tasks"),
    "openings =": ('tasks = ["asr", "sing"]\nopenings =', r"\$.tasks\[1\]"),
    "title": ('name = "x"\ntitle', r"\$.name"),
    "title =": ('schema = "2.0"\ntitle =', "newer than"),
}


@pytest.mark.parametrize("good", BAD, ids=range(len(BAD)))
def test_a_bad_recipe_is_refused_by_the_name_of_its_key(good: str) -> None:
    bad, named = BAD[good]
    assert good in GOOD
    with pytest.raises(DataError, match=named) as caught:
        recipe(GOOD.replace(good, bad, 1))
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        ("a + b <= 2 and a > 0", "a > 9", "topic sum: nothing is left to ask"),
        ("a + b <= 2 and a > 0", "1", "topic sum: formula 'number\\[a \\+ b\\]' with a = 1, b = 3: index 4"),
        ("a + b <= 2 and a > 0", "a == 1 and b == 1", "topic sum: unseen_arguments needs two"),
        ('["spain", "madrid"]', '["france", "lyon"]', "'the capital of france' has two answers, 'paris' .* 'lyon'"),
        ('["add {a} and {b}"]', '["what is {a} plus {b}"]', "'what is .* is held out .topic sum. and is not"),
        ('["add {a} and {b}"]', '["What is  {a} plus {b}"]', "'What is .* is held out .topic sum. and is not"),
    ],
)
def test_what_shows_only_when_written_out_is_refused(good: str, bad: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        planned(recipe(GOOD.replace(good, bad)), "en-us")


@pytest.mark.parametrize(("kind", "shown"), [("voices", "en-us"), ("wordings", "sum, what is")])
def test_a_plan_that_shares_what_is_new_is_refused(kind: str, shown: str) -> None:
    mine = recipe(GOOD.replace('["voices", "wordings"]', f'["{kind}"]'))
    plan = planned(mine, "en-us")
    check_disjoint(plan, mine)
    plan["test"].append(next(s for s in plan["train"] if s.question.wording.startswith("what is")))
    with pytest.raises(DataError, match=f"split test shares {kind} with train: {shown}"):
        check_disjoint(plan, mine)


def test_a_plan_that_shares_held_out_arguments_is_refused() -> None:
    mine = recipe(GOOD.replace('["voices", "wordings"]', '["arguments"]'))
    plan = planned(mine, "en-us")
    plan["train"].append(plan["test"][0])
    with pytest.raises(DataError, match="split test shares arguments with train: sum, "):
        check_disjoint(plan, mine)


def test_unknown_voices_of_a_recipe_are_refused() -> None:
    for bad, named in (("{language}+nosuch", "no variant 'nosuch'"), ("{language}+zz*", "no variant matches")):
        with pytest.raises(UsageError, match=named):
            planned(recipe(GOOD.replace("{language}+f2", bad)), "en-us")
    with pytest.raises(DataError, match="no voice is left for training"):
        planned(recipe(GOOD.replace("{language}+f2", "{language}")), "en-us")


def test_shipped_recipes_can_be_read_and_written_out() -> None:
    assert {"en-small", "repeat"} <= set(recipe_names())
    small = load_recipe("en-small")
    assert len(small.topics) >= 12
    questions = {q.text: q.answer for q in written_out(small)}
    assert questions["what is seven plus five"] == "the answer is twelve"
    assert questions["hey nano what day comes after sunday"] == "the day after is monday"
    assert questions["what month comes after december"] == "the month after is january"
    assert questions["is nine less than two"] == "no that is wrong"
    assert questions["which is more three or eight"] == "the larger number is eight"
    assert len(set(questions.values())) > 100
    with pytest.raises(UsageError, match="no recipe 'en-smal'; known are en-small"):
        load_recipe("en-smal")


def test_a_text_file_is_read_line_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("hola mundo\n\n¿qué día es?\tes lunes\nhola mundo\r\n", encoding="utf-8")
    assert read_lines(file) == [("hola mundo", "hola mundo"), ("¿qué día es?", "es lunes")]
    assert "1 line(s) repeat another" in caplog.text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"one\ntwo\tthree\tfour\n", r"lines.txt:2: has 3 columns"),
        (b"one\n\ntwo\x07\n", r"lines.txt:3: .*x07"),
        (b"question\t\n", r"lines.txt:1: there is no text"),
        (b"one\n\xff\n", r"not UTF-8"),
        (b" \n\n", r"has no text"),
    ],
)
def test_a_text_file_that_cannot_be_spoken_is_refused_with_its_line(text: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(text)
    with pytest.raises(DataError, match=named):
        read_lines(tmp_path / "lines.txt")
    with pytest.raises(DataError, match=r"none.txt: cannot be read"):
        read_lines(tmp_path / "none.txt")
