"""Profiling: meters, the synthesized question, and a whole report on scripted components."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import script, small_spec
from rich.console import Console

from edgeomni import Session
from edgeomni.errors import EdgeOmniError, UsageError
from edgeomni.profiling import measure, meters, report
from edgeomni.profiling.question import spoken_question
from edgeomni.runtimes import fake


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
        "frame.heads",
        "frame.sampling",
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
    path = measure.save(result, tmp_path / "results")
    assert path.name == f"{result['device']}-nowhere-{result['date'][:10]}.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result


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


def test_peak_memory_is_the_process_s_own() -> None:
    code = (
        "from edgeomni.profiling.meters import peak_rss_mb; a = peak_rss_mb(); b = bytes(80_000_000); "
        "c = bytearray(b); print(a, peak_rss_mb())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(float, out.split())
    assert 5 < before < 400
    assert after - before == pytest.approx(160, abs=90)


def test_percentiles_agree_with_sorting() -> None:
    seconds = np.random.default_rng(0).permutation(np.arange(101) / 1e3)
    row = meters.percentiles(seconds.tolist())
    assert (row["count"], round(row["p50_ms"]), round(row["p95_ms"]), round(row["p99_ms"])) == (101, 50, 95, 99)


def test_the_question_is_loud_voiced_and_repeatable() -> None:
    first, second = spoken_question(1.0), spoken_question(1.0)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (16000,) and first.dtype == np.float32
    assert np.abs(first).max() == pytest.approx(0.5)
    spectrum = np.abs(np.fft.rfft(first)) ** 2
    hz = np.fft.rfftfreq(len(first), 1 / 16000)
    assert spectrum[(hz > 90) & (hz < 3500)].sum() > 0.95 * spectrum.sum(), "speech lies between 90 and 3500 Hz"
