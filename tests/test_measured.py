"""Profiles that are remembered: kept per machine, read back only where they are ours, priced in milliseconds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from edgeomni import measured
from edgeomni.measured import Run

WAYS = {"encoder": "a on cpu (x:int8)", "llm": "a on cpu (x:int4)", "codec": "a on cpu (x:fp32)"}
OTHER = {**WAYS, "encoder": "b on cuda (y:int8)"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgeomni" / "profiles"


def run(**changed: Any) -> Run:
    facts: dict[str, Any] = {
        "bundle": "ab" * 32,
        "machine": measured.this_machine(),
        "threads": None,
        "question": {"seconds": 5.0, "audio": None, "overlap": "auto"},
        "ways": WAYS,
        "versions": {"a": "1.0"},
        "date": "2026-11-26T10:00:00+00:00",
        "stages": {"encoder": 100.0, "frame": 10.0},
        "ttfa": 1.0,
        "rtf": 0.5,
    }
    return Run(**{**facts, **changed})


def test_a_profile_comes_back_as_it_was_and_a_later_one_of_its_kind_replaces_it(folder: Path) -> None:
    first = run()
    assert measured.remember(first) and measured.runs(first.bundle) == [first]
    later = run(date="2026-11-27T10:00:00+00:00", ttfa=0.9)
    measured.remember(later)
    measured.remember(run(ways=OTHER))
    assert measured.runs(first.bundle) == [later, run(ways=OTHER)], "the newest first"
    assert len(list(folder.rglob("*.json"))) == 2
    assert measured.runs(first.bundle, threads=2) == [] == measured.runs("cd" * 32)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"ways": 3}', "[" * 100_000, "\0" * 100])
def test_what_is_no_profile_of_ours_is_left_aside(text: str, folder: Path) -> None:
    path = measured.remember(run())
    assert path
    path.write_text(text)
    assert measured.runs(run().bundle) == []
    other = path.with_name("other.json")
    kept = {**json.loads(json.dumps(asdict(run()))), "schema": 99}
    other.write_text(json.dumps(kept))
    assert measured.runs(run().bundle) == []
    other.write_text(json.dumps({**kept, "schema": 1, "date": "x" * measured.MOST_BYTES}))
    assert measured.runs(run().bundle) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured.remember(run()) is None and measured.runs(run().bundle) == []


def test_who_keeps_up_with_its_sound_comes_first_and_then_who_speaks_sooner() -> None:
    slow, late, soon = run(rtf=1.2, ttfa=0.1), run(rtf=0.9, ttfa=2.0), run(rtf=0.95, ttfa=0.5)
    slower, silent = run(rtf=1.3, ttfa=0.05), run(rtf=None, ttfa=None)
    assert sorted([slower, slow, late, soon], key=lambda r: r.cost) == [soon, late, slow, slower]
    assert silent.cost < replace(silent, stages={"frame": 11.0}).cost
    assert silent.words == "10.0 ms per frame" and "0.50 s, RTF 0.95" in soon.words


def test_only_what_was_asked_the_same_is_compared() -> None:
    own, better, best = run(), run(ways=OTHER, ttfa=0.8), run(ways={**OTHER, "codec": "c on cpu (z)"}, ttfa=0.2)
    elsewhere = replace(best, question={"seconds": 1.0})
    assert measured.better_than(WAYS, [own, better, elsewhere]) == [better]
    assert measured.better_than(WAYS, [own, better, best]) == [best, better]
    assert measured.better_than(OTHER, [own, better]) == [], "nothing is better"
    assert measured.better_than({**WAYS, "llm": "c"}, [own, better]) == [], "it was never measured"
    assert measured.better_than(WAYS, []) == []


def test_the_price_is_the_difference_of_the_best_times() -> None:
    known = [run(), run(stages={"encoder": 90.0}), run(ways=OTHER, stages={"encoder": 5.0})]
    words = measured.price("encoder", OTHER["encoder"], WAYS["encoder"], known)
    assert words == "the encoder then takes 90.0 ms instead of 5.0: +85.0 ms"
    assert measured.price("llm", "never", WAYS["llm"], known) == "a frame then takes 10.0 ms"
    assert measured.price("codec", OTHER["codec"], WAYS["codec"], known) == ""
    assert measured.price("llm", WAYS["llm"], "never", known) == ""


def test_an_answer_without_sound_is_weighed_by_its_frames_and_the_limit_of_keeping_up_is_one() -> None:
    """Just as long as its own sound is not in time."""
    assert run(rtf=1.0, ttfa=0.1).cost > run(rtf=0.99, ttfa=9.0).cost
    for silent in (run(ttfa=None), run(rtf=None), run(ttfa=None, rtf=None)):
        assert silent.cost == (False, 10.0) and silent.words == "10.0 ms per frame"
    assert run().words == "first audio after 1.00 s, RTF 0.50"


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    path = measured.remember(run())
    assert path
    text = path.read_text()
    path.write_text(text + " " * (measured.MOST_BYTES - len(text)))
    assert measured.runs(run().bundle) == [run()]
    path.write_text(text + " " * (measured.MOST_BYTES + 1 - len(text)))
    assert measured.runs(run().bundle) == []


def test_of_several_questions_the_last_that_was_asked_of_another_too_counts() -> None:
    """The newest come first. As fast is not faster."""
    alone, old, new = run(question={"seconds": 9.0}), run(question={"seconds": 2.0}), run()
    faster = run(ways=OTHER, ttfa=0.8, question={"seconds": 2.0})
    assert measured.better_than(WAYS, [alone, old, faster]) == [faster]
    slower = run(ways=OTHER, ttfa=1.2)
    assert measured.better_than(WAYS, [alone, new, slower, old, faster]) == [], "what was asked last"
    assert measured.better_than(WAYS, [new, run(ways=OTHER)]) == []


def test_profiles_of_other_questions_and_threads_are_kept_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (run(), run(question={"seconds": 1.0}), run(threads=2), run(machine=["another", "2", ""])):
        assert measured.remember(other)
    assert len(measured.runs(run().bundle)) == 2 and len(measured.runs(run().bundle, threads=2)) == 1
    monkeypatch.setattr(measured, "MOST_FILES", 0)
    assert measured.runs(run().bundle) == []
