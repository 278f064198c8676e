"""The demo's table from results written by hand, and what it says of answers that cannot be told as others can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeomni.demo.answer import Answer, summary
from edgeomni.demo.precisions import Measured, table
from edgeomni.evaluate.metrics import Share
from edgeomni.evaluate.result import Evaluation, Row
from edgeomni.session import TurnEnd
from edgeomni.spans import Spans
from edgeomni.spec import Task


def row(task: Task, **scores: tuple[float, float]) -> Row:
    shares = {name: Share(*share) for name, share in scores.items()}
    return Row(0, task, "here", "a b", "a b", None, None, None, "eoa", shares, {})


def profile(**turn: float) -> dict[str, Any]:
    return {"turn": turn, "bundle": {"mb": 9.64}, "peak_rss_mb": 123.4, "device": "box", "load_s": 0.5, "stages": {}}


ASR = (row("asr", wer=(1, 4), cer=(0, 9)), row("asr", wer=(0, 6), cer=(0, 9)))
HEARD = {"heard_exact": (1.0, 1.0), "ceiling_exact": (1.0, 1.0), "floor_exact": (0.0, 1.0), "heard_wer": (3.0, 4.0)}
AA = (row("aa", exact=(1, 1), **HEARD), row("aa", exact=(0, 1), **HEARD | {"heard_exact": (0.0, 1.0)}))
WHOLE = Measured("fp32", Evaluation("fp32", ASR + AA), profile(ttfa=0.0874, rtf=0.0456, total=2.0))
BARE = Measured("int4", None, profile(ttfa=0.1, rtf=0.07))


def cells(rows: list[Measured]) -> list[list[str]]:
    columns = table(rows).columns
    return [[str(column.header), *map(str, column.cells)] for column in columns]


def test_each_figure_stands_in_its_column() -> None:
    assert WHOLE.figures() == pytest.approx(
        {
            **{"wer": 10, "exact": 50, "heard": 50, "ceiling": 100, "floor": 0},
            **{"mb": 9.64, "first_audio_ms": 87.4, "rtf": 0.0456, "peak_rss_mb": 123.4},
        }
    )
    assert cells([WHOLE, BARE]) == [
        ["precision", "fp32", "INT4"],
        ["WER %", "10.0", "-"],
        ["text %", "50.0", "-"],
        ["heard %", "50.0", "-"],
        ["ceiling %", "100.0", "-"],
        ["floor %", "0.0", "-"],
        ["MB", "9.6", "9.6"],
        ["first audio ms", "87", "100"],
        ["RTF", "0.046", "0.070"],
        ["memory MB", "123", "123"],
    ]
    assert "2 questions" in str(table([BARE, WHOLE]).title)


def test_what_nobody_measured_has_no_column() -> None:
    assert [column[0] for column in cells([BARE])] == ["precision", "MB", "first audio ms", "RTF", "memory MB"]
    silent = Measured("int4", None, {**profile(), "peak_rss_mb": None})
    assert silent.figures() == {"mb": 9.64}
    assert table([silent]).title == "nano"


def test_the_file_keeps_no_places_of_temporary_files() -> None:
    kept = Measured("int4", None, {**profile(rtf=0.1), "job": {"source": "/tmp/x"}}).to_dict()
    assert "job" not in kept["profile"] and kept["profile"]["turn"] == {"rtf": 0.1} and kept["evaluation"] is None


@pytest.mark.parametrize(
    ("reason", "times", "said"),
    [
        ("eoa", {"audio": 1.24, "ttfa": 0.0876, "rtf": 0.05}, "1.2 s of sound; first audio 88 ms"),
        ("length", {"audio": 4.0, "ttfa": 0.1, "rtf": 0.05}, "4.0 s of sound, cut off there; first audio 100 ms"),
        ("eoa", {}, "no sound came"),
    ],
)
def test_the_answer_in_one_line(reason: Any, times: dict[str, float], said: str) -> None:
    end = TurnEnd(reason, "yes", np.zeros((8, 0), np.int32), 0, times, Spans())
    assert summary(Answer("", "yes", np.zeros(0, np.float32), 16_000, end)).startswith(said)
