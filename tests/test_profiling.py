"""Profiling: meters, medians and percentiles by hand, what a job asks for, and a report on scripted components."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import Clock, script, small_spec
from rich.console import Console

from edgeomni import Bundle, Session, TextDelta, TurnEnd, outputs
from edgeomni.errors import EdgeOmniError, GateError, UsageError
from edgeomni.profiling import measure, meters, report
from edgeomni.profiling.question import spoken_question
from edgeomni.runtimes import fake
from edgeomni.sampling import Sampling
from edgeomni.spans import Spans


@pytest.fixture
def fake_session(monkeypatch: pytest.MonkeyPatch) -> Session:
    spec = small_spec(context=400)
    session = Session(fake.components(spec, script(spec, 20)), spec, None)
    monkeypatch.setattr(Session, "open", lambda *a, **k: session)
    return session


def measured(**changes: Any) -> dict[str, Any]:
    return measure.measure(measure.Job("nowhere", seconds=0.5, turns=2, warmup=1, **changes))


def test_a_report_holds_every_stage_and_figure(fake_session: Session) -> None:
    result = measured()
    assert list(result["stages"]) == [
        "mel",
        "encoder",
        "prefill",
        "frame",
        "frame.body",
        "frame.text_head",
        "frame.sampling",
        "frame.audio_head",
        "codec",
    ]
    assert result["stages"]["prefill"]["count"] == 2, "the warm-up turn does not count"
    assert set(result["turn"]) >= {"ttft", "ttfa", "total", "audio", "rtf", "rtf_turn", "frames_per_s"}
    for row in result["stages"].values():
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert json.loads(report.line(result)) == result


def test_forced_frames_set_the_answer_s_length(fake_session: Session) -> None:
    result = measured(forced_frames=30)
    assert result["forced_frames"] == 30
    assert result["turn"]["audio"] == pytest.approx(30 * 16 * 4 / 24000)


def test_tables_show_the_figures(fake_session: Session) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*report.tables(measured()))
    shown = console.export_text()
    for word in ("TTFA", "RTF", "frames per second", "p95 ms", "encoder", "frame.body"):
        assert word in shown


def test_a_saved_report_is_named_by_device_bundle_and_date(fake_session: Session, tmp_path: Path) -> None:
    result = measured()
    path = measure.save({**result, "turn": {}}, tmp_path / "profiles" / "results")
    assert measure.save(result, tmp_path / "profiles" / "results") == path, "a later run of the day replaces it"
    assert path.name == f"{result['device']}-nowhere-{result['date'][:10]}.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result


def test_a_report_is_saved_whole_or_not_at_all(
    fake_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measure.save(result := measured(), tmp_path)
    assert measure.save({**result, "load_s": 7.0}, tmp_path) == path
    assert json.loads(path.read_text(encoding="utf-8"))["load_s"] == 7.0, "a later run of the same day replaces it"
    before = path.read_bytes()

    def full(new: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "rename_new", full)
    with pytest.raises(OSError, match="No space left"):
        measure.save(result, tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


WRONG_JOBS: dict[str, list[Any]] = {
    "seconds": [float("inf"), float("nan"), 1e9, 600.1, 0.09, -1.0, True],
    "turns": [0, -1, 10**9, 100_001, 1.5, None, True],
    "warmup": [-1, 100_001, None],
    "forced_frames": [-1, 100_001, 2.0],
    "forced_text_end": [0, 100_001],
    "threads": [0, -1, 100_000, True],
}


@pytest.mark.parametrize(("name", "value"), [(n, value) for n, values in WRONG_JOBS.items() for value in values])
def test_jobs_that_would_never_end_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} must .*not {value!r}$"):
        measure.Job("nowhere", **{name: value})


def test_jobs_at_their_bounds() -> None:
    measure.Job("nowhere", seconds=0.1, turns=1, warmup=0, forced_frames=0, forced_text_end=1, threads=1)
    measure.Job("nowhere", seconds=600.0, turns=100_000, warmup=100_000, forced_frames=100_000, forced_text_end=100_000)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_few_forced_frames(fake_session: Session, frames: int) -> None:
    assert measured(forced_frames=frames)["forced_frames"] == frames


def test_the_child_process_hands_its_errors_on(tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match="no such bundle or checkpoint"):
        measure.measure_apart(measure.Job(str(tmp_path / "gone")))


@pytest.mark.parametrize(("code", "kind"), [(1, EdgeOmniError), (2, UsageError), (3, GateError), (7, EdgeOmniError)])
def test_errors_of_the_child_keep_their_kind(code: int, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "a line of a library\n" + json.dumps({"error": "too slow", "exit_code": code}) + "\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=answer, returncode=0))
    with pytest.raises(EdgeOmniError, match="too slow") as caught:
        measure.measure_apart(measure.Job("nowhere"))
    assert type(caught.value) is kind


def test_the_child_gets_the_job_and_this_edgeomni(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgeomni

    seen: dict[str, Any] = {}

    def run(command: list[str], **how: Any) -> Any:
        seen.update(how, command=command)
        return SimpleNamespace(stdout='{"turn": {"rtf": 1}}', returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert measure.measure_apart(measure.Job("nowhere", turns=9)) == {"turn": {"rtf": 1}}
    job = json.loads(seen["input"])
    assert (job["source"], job["turns"], job["warmup"]) == ("nowhere", 9, 1)
    assert not seen["check"], "a child that fails tells its error on stdout"
    here = Path(edgeomni.__file__).parent.parent
    assert seen["env"]["PYTHONPATH"] == f"{here}{os.pathsep}elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    measure.measure_apart(measure.Job("nowhere"))
    assert seen["env"]["PYTHONPATH"] == str(here)


def test_a_child_that_says_nothing_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SimpleNamespace(stdout=" \n", stderr="x" * 900 + "Killed\n", returncode=-9)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: gone)
    with pytest.raises(EdgeOmniError, match=r"ended with -9: x{494}Killed$"):
        measure.measure_apart(measure.Job("nowhere"))


def test_peak_memory_is_the_process_s_own(tmp_path: Path) -> None:
    code = (
        "from edgeomni.profiling.meters import peak_rss_mb; a = peak_rss_mb(); b = bytes(80_000_000); "
        "c = bytearray(b); print(a, peak_rss_mb())"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout
    before, after = map(float, out.split())
    assert 5 < before < 400
    assert after - before == pytest.approx(160, abs=90)


def test_peak_memory_without_proc_is_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any, **how: Any) -> str:
        raise FileNotFoundError

    def told() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    monkeypatch.setattr(Path, "read_text", gone)
    before, got = told(), meters.peak_rss_mb()
    assert got is not None and before <= got <= told()
    monkeypatch.setattr(sys, "platform", "darwin")  # there in bytes
    assert meters.peak_rss_mb() == pytest.approx(got / 1024, rel=0.01)
    monkeypatch.setattr(
        Path, "read_text", lambda *a, **k: "Name:\tpython\nVmPeak:\t7 kB\nVmHWM:\t  2000 kB\nVmRSS: 5 kB\n"
    )
    assert meters.peak_rss_mb() == 2.048


def test_percentiles_by_hand() -> None:
    """Of 1, 2, 3, 4 ms: the 95th lies 0.95 * 3 = 2.85 steps up, the 99th 2.97."""
    row = meters.percentiles([0.004, 0.001, 0.003, 0.002])
    assert row == pytest.approx({"count": 4, "total_s": 0.010, "p50_ms": 2.5, "p95_ms": 3.85, "p99_ms": 3.97})
    assert meters.percentiles([0.005]) == pytest.approx(
        {"count": 1, "total_s": 0.005, "p50_ms": 5, "p95_ms": 5, "p99_ms": 5}
    )


class ScriptedSession:
    """Answers turn i with the i-th figures and spans, and keeps what it was asked."""

    overlap = "after-text"
    ways: dict[str, str] = {}

    def __init__(self, *turns: tuple[dict[str, float], dict[str, list[float]]]) -> None:
        self.spec, self.turns = small_spec(context=400), iter(turns)
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def respond(self, task: str, **how: Any) -> Iterator[Any]:
        self.asked.append((task, how))
        timings, records = next(self.turns)
        spans = Spans()
        for name, seconds in records.items():
            spans.records[name] += seconds
        yield TextDelta("one")
        yield TurnEnd("eoa", "one", np.zeros((8, 1), np.int32), 0, timings, spans)


def scripted(monkeypatch: pytest.MonkeyPatch, *turns: Any) -> ScriptedSession:
    session = ScriptedSession(*turns)
    monkeypatch.setattr(Session, "open", lambda *a, **k: session)
    return session


def test_figures_are_medians_over_the_turns_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [(100.0, 200.0), (100.0, 200.0), (1.0, 5.0), (4.0, 6.0), (2.0, 10.0), (3.0, 8.0)]
    scripted(monkeypatch, *[({"ttfa": a, "rtf": r, "own": 1.0}, {}) for a, r in ends])
    turn = measure.measure(measure.Job("nowhere", seconds=0.5, turns=4, warmup=2))["turn"]
    assert turn == {"ttfa": 2.5, "rtf": 7.0}, "known figures alone"


def test_three_turns_after_one_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted(monkeypatch, *[({"total": float(i)}, {}) for i in (9, 1, 2, 4, 9)])
    assert measure.measure(measure.Job("nowhere", seconds=0.5))["turn"] == {"total": 2.0}
    assert len(session.asked) == 4


def test_a_figure_that_a_turn_lacks_has_no_median(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ({"total": 1.0}, {}), ({"total": 2.0, "ttfa": 1.0}, {}), ({"total": 4.0}, {}))
    assert measure.measure(measure.Job("nowhere", seconds=0.5, turns=3, warmup=0))["turn"] == {"total": 2.0}


def test_stages_pool_the_spans_of_all_turns_but_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(
        monkeypatch,
        ({}, {"codec": [9.0], "frame": [9.0]}),
        ({}, {"zebra": [0.5], "codec": [0.001, 0.003], "load": [0.25], "frame": [0.002]}),
        ({}, {"codec": [0.002], "frame": [], "apple": [0.125]}),
    )
    stages = measure.measure(measure.Job("nowhere", seconds=0.5, turns=2, warmup=1))["stages"]
    assert list(stages) == ["sound file", "frame", "codec", "apple", "zebra"], "known stages first, then by name"
    assert {name: row["count"] for name, row in stages.items()} == dict(zip(stages, (1, 1, 3, 1, 1), strict=True))
    assert [row["p50_ms"] for row in stages.values()] == pytest.approx([250, 2, 2, 125, 500])
    assert stages["codec"]["total_s"] == pytest.approx(0.006)


def test_loading_is_timed_apart_from_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, session = Clock(), ScriptedSession(*[({}, {})] * 2)
    clock.install(monkeypatch)
    clock.advance(1000)

    def opened(*args: Any, **how: Any) -> ScriptedSession:
        clock.advance(3)
        return session

    monkeypatch.setattr(Session, "open", opened)
    clock.slow(monkeypatch, session, "respond", 50)
    assert measure.measure(measure.Job("nowhere", seconds=0.5, turns=1, warmup=1))["load_s"] == 3


def asked(monkeypatch: pytest.MonkeyPatch, weights: str | None = None, **job: Any) -> tuple[str, dict[str, Any], int]:
    """(task, respond's arguments, the report's forced_frames) of a job; `weights`: of a bundle, None: a checkpoint."""
    session = scripted(monkeypatch, ({}, {}))
    monkeypatch.setattr(measure, "is_bundle", lambda path: weights is not None)
    if weights:
        part = SimpleNamespace(engine="onnxruntime", format="onnx", precision="int4")
        manifest = SimpleNamespace(provenance={"weights": weights}, components={"llm": part})
        bundle = SimpleNamespace(manifest=manifest, size=3_500_000, spec=session.spec)
        monkeypatch.setattr(Bundle, "open", lambda *a, **k: bundle)
    result = measure.measure(measure.Job("some/where", turns=1, warmup=0, **{"seconds": 0.5, **job}))
    if weights:
        facts = result["bundle"]
        assert (facts["name"], facts["mb"], facts["weights"]) == ("where", 3.5, weights)
        assert facts["components"] == {"llm": "onnxruntime onnx:int4"}
    else:
        assert result["bundle"] == {"name": "where", "kind": "checkpoint"}
    ((task, how),) = session.asked
    return task, how, result["forced_frames"]


def test_a_job_asks_a_greedy_question_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    task, how, forced = asked(monkeypatch, encoder_window="auto")
    assert (task, how["sampling"], how["encoder_window"]) == ("aa", Sampling(greedy=True), "auto")
    np.testing.assert_array_equal(how["audio"], spoken_question(0.5, 16000))
    assert "forced_codes" not in how and "text" not in how and forced == 0
    assert asked(monkeypatch, audio="q.wav")[1]["audio"] == "q.wav"
    task, how, _ = asked(monkeypatch, task="ta", text="hello")
    assert (task, how["text"]) == ("ta", "hello") and "audio" not in how


def test_random_weights_answer_ten_seconds_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    _, how, forced = asked(monkeypatch, "random")
    codes = how["forced_codes"]
    assert forced == len(codes) == 117 and how["forced_text_end"] == 39
    assert codes.shape == (117, 7) and codes.min() == 0 and codes.max() == 31, "entries of a codebook of 32"
    assert "forced_codes" not in asked(monkeypatch, "random", forced_frames=0)[1]
    assert "forced_codes" not in asked(monkeypatch, "random", task="at")[1], "an answer in text has no codes"
    assert "forced_codes" not in asked(monkeypatch, "trained")[1]


def test_forced_frames_and_the_end_of_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in ("trained", None):
        _, how, forced = asked(monkeypatch, weights, forced_frames=10)
        assert (forced, len(how["forced_codes"]), how["forced_text_end"]) == (10, 10, 3)
    assert asked(monkeypatch, forced_frames=10, forced_text_end=1)[1]["forced_text_end"] == 1


REPORT: dict[str, Any] = {
    "turn": {"rtf": 0.5, "ttfa": 0.25, "prefill": 0.1},
    "load_s": 2.0,
    "peak_rss_mb": 300.0,
    "bundle": {"name": "b", "mb": 40.0, "components": {"llm": "onnxruntime onnx:int4"}, "weights": "random"},
    "stages": {"codec": {"count": 12, "p50_ms": 1.5, "p95_ms": 2.25, "p99_ms": 3.125, "total_s": 0.0625}},
    "job": {"task": "aa", "turns": 3, "warmup": 1, "threads": None},
    "device": "desk",
    "forced_frames": 117,
}


def test_budgets_and_headlines_are_picked_from_a_report() -> None:
    assert measure.budget_figures(REPORT) == {"ttfa_s": 0.25, "rtf": 0.5, "peak_rss_mb": 300.0, "bundle_mb": 40.0}
    assert list(report.figures(REPORT).items()) == [
        ("load_s", 2.0),
        ("ttfa", 0.25),
        ("rtf", 0.5),
        ("peak_rss_mb", 300.0),
        ("bundle_mb", 40.0),
    ]
    bare = {**REPORT, "turn": {"total": 0.0}, "peak_rss_mb": None, "bundle": {"name": "b"}}
    assert report.figures(bare) == {"load_s": 2.0, "total": 0.0}, "what was not measured is left out, 0 is not"
    assert measure.budget_figures(bare) == {"ttfa_s": None, "rtf": None, "peak_rss_mb": None, "bundle_mb": None}


def test_a_report_tells_how_the_answers_were_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    session, opened = scripted(monkeypatch, ({}, {})), list[dict[str, Any]]()

    def open_(source: Any, **how: Any) -> ScriptedSession:
        opened.append(how)
        return session

    monkeypatch.setattr(Session, "open", open_)
    result = measure.measure(measure.Job("nowhere", seconds=0.5, turns=1, warmup=0, overlap="on", threads=3))
    assert opened == [{"threads": 3, "device": None, "engine": None, "overlap": "on", "strict": False}]
    assert (result["overlap"], result["job"]["overlap"]) == ("after-text", "on"), "what was chosen, what was asked for"


def test_the_codec_beside_the_llm_is_not_counted_twice() -> None:
    stages = {**REPORT["stages"], "codec.wait": REPORT["stages"]["codec"], "frame": REPORT["stages"]["codec"]}
    for overlap, names in (("on", ["codec (overlapped)", "codec.wait (for it)"]), ("off", ["codec", "codec.wait"])):
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(*report.tables({**REPORT, "stages": stages, "overlap": overlap}))
        shown = console.export_text()
        rows = [line.strip("│┃ ").split("│")[0].strip() for line in shown.splitlines()]
        assert [row for row in rows if row.startswith(("codec", "frame"))][:3] == [*names, "frame"]
        assert (
            ("frame + codec.wait" in shown) == ("overlap on: the codec computed beside" in shown) == (overlap == "on")
        )


def test_tables_name_what_was_measured_and_how() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*report.tables(REPORT))
    shown = console.export_text()
    for part in (
        "b on desk: aa, 3 turns after 1 warm-up, threads all",
        "llm onnxruntime onnx:int4; random weights; answer forced to 117 codec frames",
        "first audio (TTFA)",
    ):
        assert part in shown
    rows = [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in shown.splitlines()]
    assert ["figure", "median", "unit"] in rows
    assert ["stage", "count", "p50 ms", "p95 ms", "p99 ms", "total s"] in rows
    assert ["codec", "12", "1.50", "2.25", "3.12", "0.062"] in rows
    assert ["load: open the bundle and its engines", "2", "s"] in rows
