"""`overlap="auto"`: what is timed, what is chosen by it, and how that is remembered."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Clock, small_bundle, small_spec
from overlapped import no_thread_is_left

from edgeomni import Bundle, overlap_choice
from edgeomni.components import Components, OpenOptions
from edgeomni.errors import EngineError
from edgeomni.overlap_choice import best_of, fastest, timed
from edgeomni.runtimes import fake

SPEC = small_spec(context=200)
TWO = OpenOptions(2)


class Timed(fake.FakeCodec):
    """Each push takes so long: beside the LLM another time than alone. Only the loop's own thread moves the clock."""

    def __init__(self, spec: Any, clock: Clock, alone: float) -> None:
        super().__init__(spec)
        self.clock, self.alone, self.home = clock, alone, threading.get_ident()

    def decode(self, *args: Any) -> Any:
        if threading.get_ident() == self.home:
            self.clock.advance(self.alone)
        return super().decode(*args)


def components(monkeypatch: pytest.MonkeyPatch, text: float, after: float, push: float, spec: Any = SPEC) -> Components:
    """Parts whose frames take so long with two rows, and with one, on a clock of their own."""
    clock = Clock()
    clock.install(monkeypatch)

    class Llm(fake.FakeLanguageModel):
        def forward(self, ids: Any, *args: Any, **how: Any) -> Any:
            clock.advance({1: after, 2: text}[len(ids)])
            return super().forward(ids, *args, **how)

    return Components(fake.FakeEncoder(spec), Llm(spec, [[0] * 8]), Timed(spec, clock, push))


def test_stretches_hold_the_same_pushes_and_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve frames each: three pushes of four. Beside the LLM they take no time of the loop here."""
    with no_thread_is_left():
        seconds = timed(components(monkeypatch, 5, 2, 7), SPEC, 2)
    assert seconds == {
        "off": {"text": 12 * 5 + 3 * 7, "after": 12 * 2 + 3 * 7},
        "on": {"text": 12 * 5, "after": 12 * 2},
    }


@pytest.mark.parametrize(("push_multiple", "length", "pushes"), [(2, 16, 2), (4, 16, 1), (3, 12, 1)])
def test_stretches_of_codecs_that_take_whole_windows(
    push_multiple: int, length: int, pushes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = components(monkeypatch, 5, 2, 7)
    parts.codec.push_multiple = push_multiple
    assert timed(parts, SPEC, 2)["off"] == {"text": length * 5 + pushes * 7, "after": length * 2 + pushes * 7}


def test_slow_machines_are_timed_once_and_fast_ones_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for frame, answers in ((1.0, 3), (0.001, 7)):
        parts, starts = components(monkeypatch, frame, frame, 0.0), list[int]()
        start = parts.llm.start
        monkeypatch.setattr(parts.llm, "start", lambda *a, s=start, n=starts: (n.append(1), s(*a))[1])
        timed(parts, SPEC, 2)
        assert len(starts) == answers
        monkeypatch.undo()


def test_the_fastest_of_several_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([0.0, *[9.0] * 4, *[3.0, 5.0], *[4.0, 2.0]])

    def frame_times(components: Any, spec: Any, overlap: Any, plan: Any, last: int) -> list[float]:
        length = next(given)
        return [i * length for i in range(last + 1)]

    monkeypatch.setattr(overlap_choice, "_frame_times", frame_times)
    monkeypatch.setattr(overlap_choice, "PAIRS", 4)
    seconds = timed(fake.components(SPEC, []), SPEC, 2)
    assert seconds == {"off": {"text": 36.0, "after": 36.0}, "on": {"text": 24.0, "after": 24.0}}


def test_a_context_too_short_for_the_answer_is_not_timed() -> None:
    """The question takes 7 frames, and the answer's last timed frame has index 48."""
    plan = overlap_choice._Stretches(7, 3, 1)
    for context, times in ((plan.end + 7, False), (plan.end + 8, True)):
        spec = small_spec(context=context)
        parts = fake.components(spec, [[0] * 8])
        assert bool(timed(parts, spec, 2)) == times
    assert best_of({}) == "off"


def test_a_model_without_speech_understanding_is_asked_in_text() -> None:
    spec = small_spec(context=200, tasks=("tt", "ta"))
    parts = fake.components(spec, [[0] * 8])
    assert set(timed(parts, spec, 2)) == {"off", "on"}


@pytest.mark.parametrize(
    ("off", "on", "best"),
    [
        ((10, 10), (5, 5), "on"),
        ((10, 10), (15, 5), "after-text"),
        ((10, 10), (12, 11), "off"),
        ((10, 10), (5, 11), "on"),  # 5 + 2 * 11 against 30
        ((10, 10), (7, 11), "off"),
        ((10, 10), (9.6, 9.6), "off"),  # not worth a thread
        ((10, 10), (10.1, 9.3), "off"),
        ((10, 10), (10.1, 9.2), "after-text"),
        ((10, 10), (9.0, 9.5), "on"),
    ],
)
def test_which_mode_is_best(off: tuple[float, float], on: tuple[float, float], best: str) -> None:
    names = ("text", "after")
    seconds = {"off": dict(zip(names, off, strict=True)), "on": dict(zip(names, on, strict=True))}
    assert best_of(seconds) == best


# --- remembering


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where choices are kept; nothing is remembered in the process yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEOMNI_OVERLAP_CACHE", raising=False)
    monkeypatch.setattr(overlap_choice, "_chosen", {})
    return tmp_path / "cache" / "edgeomni" / "overlap"


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each timing, which finds that the codec had better compute after the text."""
    seen: list[int] = []

    def measured(components: Any, spec: Any, threads: int) -> dict[str, dict[str, float]]:
        seen.append(threads)
        return {"off": {"text": 1.0, "after": 1.0}, "on": {"text": 2.0, "after": 0.5}}

    monkeypatch.setattr(overlap_choice, "timed", measured)
    return seen


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(small_bundle(tmp_path / "bundle", SPEC))


PARTS = fake.components(SPEC, [])


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(overlap_choice, "_chosen", {})


def test_a_choice_is_timed_once_per_process_and_once_per_machine(
    cache: Path, timings: list[int], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fastest(bundle, PARTS, TWO) == "after-text" == fastest(bundle, PARTS, TWO)
    forget(monkeypatch)
    assert fastest(bundle, PARTS, TWO) == "after-text" and timings == [2]
    (path,) = cache.iterdir()
    kept = json.loads(path.read_text())
    assert kept["mode"] == "after-text" and kept["seconds"]["on"]["after"] == 0.5
    assert kept["key"]["bundle"] == bundle.digest and kept["key"]["engines"] == dict.fromkeys(
        ("encoder", "llm", "codec"), "onnxruntime"
    )


def test_another_machine_bundle_engine_or_number_of_threads_is_timed_anew(
    cache: Path, timings: list[int], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(bundle, PARTS, TWO)
    fastest(bundle, PARTS, OpenOptions(3))
    fastest(Bundle.open(small_bundle(tmp_path / "other", small_spec(context=201))), PARTS, TWO)
    for name, other in (("cpu_name", lambda: "other"), ("versions_of", lambda engines: {"onnxruntime": "0"})):
        with monkeypatch.context() as patch:
            patch.setattr(overlap_choice, name, other)
            fastest(bundle, PARTS, TWO)
    assert timings == [2, 3, 2, 2, 2] and len(list(cache.iterdir())) == 5
    with monkeypatch.context() as patch:
        patch.setattr(overlap_choice, "cores", lambda: 5)
        fastest(bundle, PARTS, OpenOptions(None))
        fastest(bundle, PARTS, TWO)
    assert timings[5:] == [5, 2], "another number of cores is another machine"


SPOILT: list[Any] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"mode": "on"}',
    b"[" * 5000,
    b" " * 100_000,
    {"mode": "sideways"},
    {"mode": ["on"]},
    {"mode": None},
    {"key": {"schema": 1}},
    {"key": None},
]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_file_that_is_spoilt_or_foreign_is_timed_again_and_replaced(
    spoilt: Any, cache: Path, timings: list[int], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(bundle, PARTS, TWO)
    (path,) = cache.iterdir()
    good = json.loads(path.read_text())
    path.write_bytes(spoilt if isinstance(spoilt, bytes) else json.dumps({**good, **spoilt}).encode())
    forget(monkeypatch)
    assert fastest(bundle, PARTS, TWO) == "after-text" and timings == [2, 2]
    assert json.loads(path.read_text()) == good and [p.name for p in cache.iterdir()] == [path.name]


def test_a_directory_in_the_file_s_place_does_no_harm(
    cache: Path, timings: list[int], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(bundle, PARTS, TWO)
    (path,) = cache.iterdir()
    path.unlink()
    path.mkdir()
    forget(monkeypatch)
    assert fastest(bundle, PARTS, TWO) == "after-text" and path.is_dir()


def test_a_home_that_cannot_be_written_does_no_harm(
    cache: Path, timings: list[int], bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert fastest(bundle, PARTS, TWO) == "after-text"
    assert timings == [2], "the process itself remembers"


def test_the_cache_can_be_switched_off(
    cache: Path, timings: list[int], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(bundle, PARTS, TWO)
    (path,) = cache.iterdir()
    path.write_text(path.read_text().replace('"after-text"', '"on"'))
    monkeypatch.setenv("EDGEOMNI_OVERLAP_CACHE", "0")
    forget(monkeypatch)
    assert fastest(bundle, PARTS, TWO) == "after-text", "the file is not read"
    path.unlink()
    forget(monkeypatch)
    assert fastest(bundle, PARTS, TWO) == "after-text" and not list(cache.iterdir()) and timings == [2, 2, 2]


def test_what_was_not_timed_is_not_remembered(cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_choice, "timed", lambda *a: {})
    assert fastest(bundle, PARTS, TWO) == "off" and not cache.exists()


def test_a_bundle_that_fails_is_not_refused_here(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise EngineError("the codec failed")

    caplog.set_level("INFO", "edgeomni")
    parts = fake.components(SPEC, [[0] * 8])
    monkeypatch.setattr(parts.codec, "decode", broken)
    assert fastest(bundle, parts, TWO) == "off" and not cache.exists()
    assert caplog.messages[0] == "codec beside LLM could not be timed: the codec failed"


def test_the_timed_answer_holds_no_more_frames_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, asked = fake.components(SPEC, [[0] * 8]), set[tuple[int, int]]()
    start = parts.llm.start

    def noted(rows: int, frames: int) -> Any:
        asked.add((rows, frames))
        return start(rows, frames)

    monkeypatch.setattr(parts.llm, "start", noted)
    assert timed(parts, SPEC, 2)
    assert asked == {(2, overlap_choice._Stretches(7, 3, 1).end + 1 + 7)}


def test_what_cannot_gain_is_not_timed(cache: Path, timings: list[int], bundle: Bundle, tmp_path: Path) -> None:
    silent = Bundle.open(small_bundle(tmp_path / "silent", small_spec(tasks=("asr", "at"))))
    for source, options in ((bundle, OpenOptions(1)), (bundle, OpenOptions(2, "cuda")), (silent, TWO)):
        assert fastest(source, PARTS, options) == "off"
    assert timings == [] and not cache.exists()


def test_the_timing_answer_is_an_ordinary_one() -> None:
    """On parts that check their rules: the fake LLM and codec raise where they are used wrongly."""
    parts = fake.components(SPEC, [[0] * 8], first_push=5, push_multiple=2)
    seconds = timed(parts, SPEC, 4)
    assert all(np.isfinite(s) and s > 0 for row in seconds.values() for s in row.values())
