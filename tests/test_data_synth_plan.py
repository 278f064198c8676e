"""Plans of synthesized data: who asks what, within which ranges, and how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from test_data_synth_recipes import GOOD, recipe

from edgeomni.data.recipe_files import load_recipe
from edgeomni.data.synth_plan import language_of, planned, pools_of
from edgeomni.data.synth_questions import written_out
from edgeomni.data.synth_speech import Job, Speech, record
from edgeomni.errors import DataError, UsageError

RANGES = """
rate_wpm = [150, 160]
unseen_rate_wpm = [200, 210]
pitch = [40, 45]
unseen_pitch = [70, 75]
pitch_range = [10, 12]
[recording]
before_s = [0.1, 0.2]
after_s = [0.3, 0.4]
gain_db = [-6, -3]
noise_share = 0.5
snr_db = [15, 20]
[[topics]]"""
MINE = GOOD.replace("[[topics]]", RANGES, 1).replace(
    "samples = 5", "samples = 40\nrecording = { noise_share = 1.0, snr_db = [5, 5], before_s = [1, 1] }"
)


def test_speeds_pitches_and_recordings_lie_within_their_ranges_and_reach_both_ends() -> None:
    plan = planned(recipe(MINE), "en-us", samples=400)
    train, test = ([sample.speech for sample in plan[split]] for split in ("train", "test"))
    for speeches, rates, pitches in ((train, (150, 160), (40, 45)), (test, (200, 210), (70, 75))):
        assert (min(s.rate_wpm for s in speeches), max(s.rate_wpm for s in speeches)) == rates
        assert (min(s.pitch for s in speeches), max(s.pitch for s in speeches)) == pitches
        assert {s.pitch_range for s in speeches} == {10, 11, 12}
    assert all(0.1 <= s.before_s <= 0.2 and 0.3 <= s.after_s <= 0.4 and -6 <= s.gain_db <= -3 for s in train)
    noisy = [s.snr_db for s in train if s.snr_db is not None]
    assert 150 < len(noisy) < 250 and 15 <= min(noisy) < 15.5 and 19.5 < max(noisy) <= 20
    assert {(s.snr_db, s.before_s) for s in test} == {(5, 1)}
    assert len({s.seed for s in train}) == 400


def test_without_unseen_ranges_new_voices_speak_as_all() -> None:
    plan = planned(recipe(GOOD.replace("samples = 5", "samples = 100")), "en-us")
    assert {130 <= s.speech.rate_wpm <= 190 and 30 <= s.speech.pitch <= 70 for s in plan["test"]} == {True}


def test_every_question_is_asked_once_before_one_is_asked_twice() -> None:
    text = GOOD.replace('new = ["voices", "wordings"]', 'new = ["wordings"]').replace("samples = 5", "samples = 6")
    asked = Counter(sample.question.text for sample in planned(recipe(text), "en-us")["test"])
    assert sorted(asked.values()) == [1, 1, 2, 2]  # two sums are in training, each with two openings


def test_topics_are_asked_by_their_weights() -> None:
    text = GOOD.replace('name = "sum"', 'name = "sum"\nweight = 3')
    topics = Counter(sample.question.topic for sample in planned(recipe(text), "en-us", samples=2000)["train"])
    assert topics["sum"] / topics["capital"] == pytest.approx(3, rel=0.15)


def test_voices_are_matched_and_taken_in_turn() -> None:
    text = GOOD.replace('voices = ["{language}"]', 'voices = ["{language}", "{language}+klatt*", "en-gb+m3"]')
    text = text.replace('unseen = ["{language}+f2"]', 'unseen = ["{language}+klatt2"]\nnever = ["{language}+klatt3"]')
    pools = pools_of(recipe(text).question_voice, "en-us", "mine")
    assert pools.unseen == ["en-us+klatt2"]
    assert pools.seen == ["en-us", "en-us+klatt", "en-us+klatt4", "en-us+klatt5", "en-us+klatt6", "en-gb+m3"]
    asked = Counter(sample.speech.voice for sample in planned(recipe(text), "en-us", samples=12)["train"])
    assert asked == dict.fromkeys(pools.seen, 2)


def test_a_language_fits_a_recipe_with_its_dialects() -> None:
    small = load_recipe("en-small")
    assert language_of(small, None) == "en-us" and language_of(small, "en-gb") == "en-gb"
    assert language_of(load_recipe("repeat"), "cmn") == "cmn"
    english = recipe('languages = ["en-us"]\n' + GOOD)
    assert language_of(english, "en-us-nyc") == "en-us-nyc"
    for wrong in ("es", "en", "en-gb"):
        with pytest.raises(UsageError, match=f"written for en-us, not for '{wrong}'"):
            language_of(english, wrong)


def test_two_arguments_are_enough_to_hold_one_out() -> None:
    text = GOOD.replace('answer = "{city}"', 'answer = "{city}"\nunseen_arguments = 5')
    capitals = [q for q in written_out(recipe(text)) if q.topic == "capital"]
    assert sorted(q.new_arguments for q in capitals) == [False, False, True, True]  # with two openings each


def test_a_recipe_with_too_many_questions_is_refused() -> None:
    words = ", ".join(f'"w{i}"' for i in range(1500))
    large = GOOD.replace('["zero", "one", "two", "three"]', f"[{words}]").replace("number[a + b]", "number[0]")
    with pytest.raises(DataError, match="topic sum: its arguments have 2250000 combinations"):
        written_out(recipe(large))


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("before_s", "[0, 10]", "[0, 10.1]"),
        ("after_s", "[0, 10]", "[-0.1, 1]"),
        ("gain_db", "[-60, 20]", "[-61, 0]"),
        ("gain_db", "[0, 0]", "[0, 21]"),
        ("snr_db", "[-20, 100]", "[-21, 0]"),
        ("snr_db", "[5, 5]", "[5, 101]"),
        ("snr_db", "[5, 6]", "[6, 5]"),
    ],
)
def test_ranges_of_recordings_are_bounded(key: str, inside: str, outside: str) -> None:
    recipe(GOOD.replace("[lists]", f"[recording]\n{key} = {inside}\n[lists]"))
    with pytest.raises(DataError, match=rf"\$.recording.{key}: .* must be a range"):
        recipe(GOOD.replace("[lists]", f"[recording]\n{key} = {outside}\n[lists]"))


@pytest.mark.parametrize("wrong", ["rate_wpm = 79", "pitch = 100", "pitch_range = -1", "before_s = -1", "after_s = 11"])
def test_the_answer_voice_is_bounded(wrong: str) -> None:
    with pytest.raises(DataError, match=rf"\$.answer_voice.{wrong.split()[0]}"):
        recipe(GOOD.replace("[lists]", f"[answer_voice]\n{wrong}\n[lists]"))


def test_a_recording_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    speech = Speech("hello", "en-us", 160, 50, 50, 0, 0)
    with pytest.raises(DataError, match="x.wav: cannot be written .No such file or directory"):
        record(Job(tmp_path / "no-folder" / "x.wav", speech, 16_000))
