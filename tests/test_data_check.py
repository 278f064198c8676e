"""Checking data: each finding against a sample made to have it, one bad sample among good ones, nothing dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile

from edgeomni.arrays import F32
from edgeomni.data.check import MEANING, WARNINGS, CheckReport, Kind, Limits, check, histogram
from edgeomni.data.check_sound import clipped_runs, listen
from edgeomni.data.check_text import spoken_length
from edgeomni.data.readers import DataSet
from edgeomni.data.records import Fault
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import AudioError, DataError

RATE = 16000


def tone(seconds: float, rate: int = RATE, peak: float = 0.3, hz: float = 220) -> F32:
    return (peak * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


Record = Callable[..., Clip]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Writes samples as a sound file and gives its clip."""

    def write(samples: F32, rate: int = RATE, name: str = "") -> Clip:
        path = tmp_path / (name or f"{len(list(tmp_path.iterdir()))}.wav")
        soundfile.write(path, samples, rate, subtype="FLOAT")
        return Clip.of(path)

    return write


def good(record: Record, hz: float = 220, **fields: Any) -> Sample:
    """A sample in which nothing is to be found; `hz` tells its sound from others."""
    return Sample(**{"where": f"t.jsonl:{hz:g}", "audio": (record(tone(1, hz=hz)),), "text": "hello", **fields})


def checked(*samples: Sample, faults: tuple[Fault, ...] = (), **limits: Any) -> CheckReport:
    return check(DataSet(list(samples), "native", list(faults), "t.jsonl"), Limits(**limits), threads=2)


def found(report: CheckReport) -> list[tuple[int | None, str]]:
    return [(finding.index, finding.kind) for finding in report.findings]


def broken() -> bytes:
    raise AudioError("the archive is gone")


def test_nothing_is_found_in_good_data(record: Record) -> None:
    report = checked(good(record, 200), good(record, 300, answer="yes", answer_audio=record(tone(0.5, 24000), 24000)))
    assert found(report) == []
    assert report.passed() and report.passed(strict=True)
    assert report.rates == {16000: 2, 24000: 1}
    np.testing.assert_allclose(report.question_s, [1, 1])
    np.testing.assert_allclose(report.answer_s, [0, 0.5])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("silent", lambda record: {"audio": (record(np.zeros(RATE, np.float32)),)}),
        ("low-rate", lambda record: {"audio": (record(tone(1, 15999), 15999),)}),
        ("clipped", lambda record: {"audio": (record(np.clip(tone(1, peak=3), -1, 1)),)}),
        ("too-long", lambda record: {"audio": (record(tone(2.01)),)}),
        ("too-long", lambda record: {"audio": (record(tone(1.2)), record(tone(0.9, hz=90)))}),
        ("text", lambda record: {"text": "x" * 31}),
        ("text", lambda record: {"answer": "x" * 16, "answer_audio": record(tone(0.5))}),
        ("fields", lambda record: {"task": "at"}),
        ("fields", lambda record: {"text": " "}),
        ("unreadable", lambda record: {"audio": (Clip.of("nowhere.wav"),)}),
        ("unreadable", lambda record: {"audio": (Clip(lambda: b"RIFF no sound", "t.jsonl:9"),)}),
        ("unreadable", lambda record: {"audio": (Clip(broken, "t.jsonl:9"),)}),
        ("unreadable", lambda record: {"audio": (record(np.full(RATE, np.nan, np.float32)),)}),
        ("unreadable", lambda record: {"audio": (Clip.of(record(tone(1)).name, 3.0),)}),
        ("silent", lambda record: {"answer": "yes", "answer_audio": record(np.zeros(RATE, np.float32))}),
    ],
)
def test_one_bad_sample_among_good_ones(record: Record, kind: str, change: Callable[[Record], dict[str, Any]]) -> None:
    bad = replace(good(record, 250), **change(record))
    report = checked(good(record, 200), bad, good(record, 300), window_s=2)
    assert found(report) == [(1, kind)]
    (finding,) = report.findings
    assert finding.where == bad.where and finding.what
    assert report.passed() == (kind in ("low-rate", "clipped"))
    assert not report.passed(strict=True)
    assert list(report.unusable()) == ([] if kind in ("low-rate", "clipped") else [1])
    assert list(report.unusable(strict=True)) == [1]


def test_limits_are_met_exactly(record: Record) -> None:
    """What lies on a limit is within it."""
    sample = good(record, audio=(record(tone(1)),), text="x" * 30)
    assert found(checked(sample, window_s=1)) == []
    assert found(checked(sample, window_s=0.99)) == [(0, "too-long")]
    assert found(checked(sample, chars_per_s=29.9)) == [(0, "text")]


@pytest.mark.parametrize("limits", [{"window_s": 0}, {"chars_per_s": -1}, {"chars_per_s": 0}, {"window_s": math.nan}])
def test_impossible_limits_are_refused(record: Record, limits: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="above 0"):
        checked(good(record), **limits)


def test_lines_that_are_no_samples_are_findings(record: Record) -> None:
    report = checked(good(record), faults=(Fault("t.jsonl:7", "is no JSON"),))
    assert found(report) == [(None, "line")]
    assert report.findings[0].where == "t.jsonl:7" and report.findings[0].what == "is no JSON"
    assert not report.passed() and report.unusable() == {}


class TestDuplicates:
    def test_the_same_sound_in_another_file_with_the_same_text(self, record: Record) -> None:
        samples = [good(record, 200), good(record, 300), replace(good(record, 200), where="u.jsonl:5")]
        report = checked(*samples)
        assert found(report) == [(2, "duplicate")]
        assert samples[0].where in report.findings[0].what

    def test_of_three_the_first_stays(self, record: Record) -> None:
        assert found(checked(*(good(record) for _ in range(3)))) == [(1, "duplicate"), (2, "duplicate")]

    @pytest.mark.parametrize(
        "other",
        [{"text": "hallo"}, {"task": "asr"}, {"answer": "yes"}, {"system": "be brief"}, {"history": (("a", "b"),)}],
    )
    def test_another_text_or_task_is_another_sample(self, record: Record, other: dict[str, Any]) -> None:
        assert found(checked(good(record), replace(good(record), **other))) == []

    def test_the_same_samples_at_another_rate_are_another_sound(self, record: Record) -> None:
        samples = tone(1)
        audios = [(record(samples, rate),) for rate in (16000, 22050)]
        assert found(checked(*(good(record, audio=audio) for audio in audios))) == []

    def test_written_questions_and_codes(self) -> None:
        codes = np.arange(14).reshape(2, 7)
        asked = Sample("t:1", text="two and two", answer="four")
        spoken = replace(asked, answer_codes=codes)
        report = checked(asked, spoken, replace(spoken, answer_codes=codes + 1), replace(asked, text="two  and two"))
        assert found(report) == [(3, "duplicate")]

    def test_unreadable_ones_are_not_compared(self) -> None:
        clips = [(Clip.of(f"nowhere{i}.wav"),) for i in range(2)]
        report = checked(*(Sample(f"t:{i}", audio=audio, text="hello") for i, audio in enumerate(clips)))
        assert found(report) == [(0, "unreadable"), (1, "unreadable")]


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("Hello, world!", 10),
        ("e\u0301te\u0301", 3),
        ("4711", 12),
        ("你好。", 6),
        ("한국", 6),
        ("カタ かな", 12),
    ]
    + [("привет", 6), ("नमस्ते", 4), (" \n\t…", 0)],
)
def test_spoken_length(text: str, length: int) -> None:
    assert spoken_length(text) == length


@pytest.mark.parametrize(
    ("samples", "runs"),
    [
        ([0.5, 1, 1, 0.5], 0),
        ([0.5, 1, 1, 1, 0.5], 1),
        ([1, 1, 1], 1),
        ([-1, -1, -1, 0, 1, 1.5, 2, 0, 1, 1], 2),
        ([0.998] * 9, 0),
        ([0.999] * 3, 1),
        ([0.9991] * 9, 1),
    ],
)
def test_clipped_runs(samples: list[float], runs: int) -> None:
    assert clipped_runs(np.array(samples, np.float32)) == runs


def test_a_part_of_a_recording_is_measured_alone(record: Record) -> None:
    whole = record(np.concatenate([tone(1), np.zeros(RATE, np.float32), tone(2, peak=0.5)]))
    assert isinstance(whole.source, Path)
    heard = listen(Clip.of(whole.source, 2, 3.5))
    assert (heard.seconds, heard.rate, heard.fault) == (1.5, RATE, "")
    assert listen(Clip.of(whole.source, 1.1, 1.9)).silent


def test_shares_and_tasks(record: Record) -> None:
    answer = {"answer": "yes", "answer_audio": record(tone(0.5))}
    report = checked(
        good(record, 200, language="en", speaker="a"),
        good(record, 210, language="es", speaker="a", **answer),
        good(record, 220, language="es"),
    )
    assert {name: count for name, (count, _) in report.shares("language").items()} == {"es": 2, "en": 1}
    assert list(report.shares("language")) == ["es", "en"]
    assert report.shares("language")["es"][1] == pytest.approx(2.5 / 3600)
    assert {name: count for name, (count, _) in report.shares("speaker").items()} == {"a": 2, "not stated": 1}
    assert list(checked(*(good(record, 200 + i, speaker=s) for i, s in enumerate("bca"))).shares("speaker")) == [*"abc"]
    assert report.tasks() == {"asr": 3, "at": 1, "aa": 1, "tt": 1, "ta": 1}


def test_histogram_counts_what_has_a_duration() -> None:
    bars = histogram(np.array([0, 0.5, 1.5, 1.6, 4.0]), bins=4)
    assert bars == {"edges_s": [0, 1, 2, 3, 4], "counts": [1, 2, 0, 1]}
    assert histogram(np.zeros(3)) == {"edges_s": [], "counts": []}


def test_progress_reaches_the_end(record: Record) -> None:
    told: list[tuple[int, int]] = []
    sample = good(record)
    check(DataSet([sample] * 130, "native", [], "t"), progress=lambda *at: told.append(at))
    assert told[-1] == (130, 130) and sorted(told) == told and len(told) > 1


def test_every_kind_has_a_meaning() -> None:
    assert set(MEANING) == set(get_args(Kind)) > WARNINGS
