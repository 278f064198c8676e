"""The log of a run, which outlives its process, and what is shown meanwhile: plain lines, or a bar on a terminal."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import Clock
from rich.console import Console

from edgeomni.errors import TrainError
from edgeomni.train.progress import Progress
from edgeomni.train.run_log import RunLog, read


def without_seconds(path: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read(path)]


def test_lines_are_json_with_the_time_and_null_for_what_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.install(monkeypatch)
    log = RunLog(tmp_path / "log.jsonl")
    clock.advance(1.5)
    log.write({"step": 1, "loss": 2.5})
    clock.advance(2)
    log.write({"step": 2, "grad_norm": float("inf"), "loss": float("nan")})
    text = (tmp_path / "log.jsonl").read_text()
    assert (
        text
        == '{"step": 1, "loss": 2.5, "seconds": 1.5}\n{"step": 2, "grad_norm": null, "loss": null, "seconds": 3.5}\n'
    )
    assert read(tmp_path / "log.jsonl") == [json.loads(line) for line in text.splitlines()]


def test_a_line_survives_the_death_of_its_process(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "import os, signal, sys; from edgeomni.train.run_log import RunLog; log = RunLog(sys.argv[1]);"
        "[log.write({'step': i}) for i in range(3)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert [line["step"] for line in read(path)] == [0, 1, 2]


def test_trim_drops_later_lines_and_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 10, "loss": 1.0}\n{"step": 10, "eval_loss": 2.0}\n{"step": 20, "loss": 3.0}\n{"step": 20, "ev'
    )
    RunLog(path).trim(10)
    assert path.read_text() == '{"step": 10, "loss": 1.0}\n{"step": 10, "eval_loss": 2.0}\n'
    RunLog(path).write({"step": 20, "loss": 4.0})
    assert without_seconds(path)[2:] == [{"step": 20, "loss": 4.0}]


def test_trim_keeps_all_that_is_not_beyond_the_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    RunLog(path).trim(5)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 5')
    RunLog(path).trim(5)
    assert path.read_text() == '{"step": 1}\n'
    RunLog(path).trim(0)
    assert path.read_text() == "" and not read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"step": 1}\n{"step": \n{"step": 3}\n', r"log\.jsonl:2: not valid JSON"),
        ('{"step": 1}\n{"loss": 1.0}\n', r"log\.jsonl:2: \$\.step: has no step"),
        ('{"step": true}\n', r"log\.jsonl:1"),
        ("[1]\n", r"log\.jsonl:1: holds a list"),
        ('{"step": 1}\n\n{"step": 2}\n', r"log\.jsonl:2: the file is empty"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(TrainError, match=said):
        read(path)


def test_a_log_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(TrainError, match=r"cannot be written"):
        RunLog(tmp_path / "none" / "log.jsonl").write({"step": 1})
    with pytest.raises(TrainError, match=r"No space left"):
        RunLog("/dev/full").write({"step": 1})


def plain(width: int = 200) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, highlight=False, markup=False), out


def test_plain_lines_come_every_few_seconds_with_rate_and_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, (console, out) = Clock(), plain()
    clock.install(monkeypatch)
    shown = Progress(console, every_s=10)
    shown.start(100)
    for step in range(1, 27):
        clock.advance(1)
        shown.update(step, 5 / step, 1000 * step)
    assert out.getvalue().splitlines() == [
        "train: step 1/100, loss 5, 1,000 tokens/s, 0:01:39 left",
        "train: step 11/100, loss 0.4545, 1,000 tokens/s, 0:01:29 left",
        "train: step 21/100, loss 0.2381, 1,000 tokens/s, 0:01:19 left",
    ]
    shown.stop()
    shown.stop()
    assert out.getvalue().splitlines()[3:] == ["train: step 26/100, loss 0.1923, 1,000 tokens/s, 0:01:14 left"]


def test_a_resumed_run_counts_its_own_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, (console, out) = Clock(), plain()
    clock.install(monkeypatch)
    shown = Progress(console, title="codec")
    shown.start(1000, done=900)
    clock.advance(20)
    shown.update(910, 1.23456, 5000)
    assert out.getvalue() == "codec: step 910/1000, loss 1.235, 250 tokens/s, 0:03:00 left\n"


def test_before_any_time_has_passed_there_is_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, (console, out) = Clock(), plain()
    clock.install(monkeypatch)
    shown = Progress(console)
    shown.stop()
    shown.start(10)
    shown.update(0, 2.0, 0)
    assert out.getvalue() == "train: step 0/10, loss 2\n"


def test_notes_are_shown_as_they_are() -> None:
    console, out = plain(width=20)
    shown = Progress(console)
    shown.start(10)
    shown.note("step 3: [bold]validation[/] loss 1.25 is the best")
    assert out.getvalue() == "step 3: [bold]validation[/] loss 1.25 is the best\n"


def test_a_terminal_gets_a_bar_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(), io.StringIO()
    clock.install(monkeypatch)
    console = Console(file=out, force_terminal=True, width=120, highlight=False, color_system=None)
    shown = Progress(console)
    shown.start(100)
    clock.advance(4)
    shown.update(50, 0.5, 8000)
    shown.note("halfway")
    shown.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "step 50/100, loss 0.5, 2,000 tokens/s, 0:00:04 left" in text and "halfway" in text
    bar = [line for line in text.splitlines() if "step 50/100" in line][-1]
    assert bar.startswith("train ") and 15 < bar.count("━") <= 40


def test_it_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.start(2)
    shown.update(1, 1.0, 10)
    shown.note("a note")
    shown.stop()
    captured = capsys.readouterr()
    assert captured.out == "" and "step 1/2" in captured.err and "a note" in captured.err
