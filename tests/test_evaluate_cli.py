"""`edgeomni evaluate` on a tiny checkpoint and on its INT4 bundle, as a user spells it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from edgeomni.cli import main
from edgeomni.data import espeak
from edgeomni.export import export_bundle

TEXTS = ["the answer is twelve", "the answer is forty", "it is monday"]
BOUNDS = ("--max-length", 110, "--max-seconds", 0.3, "--threads", 1)


def edgeomni(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(tiny_model, tmp_path_factory.mktemp("b") / "bundle", precision="int4", threads=1).path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples with all fields, then one whose question is no sound, and a line that is no JSON."""
    root = tmp_path_factory.mktemp("data")
    lines = []
    for i, text in enumerate(TEXTS):
        soundfile.write(root / f"{i}.wav", espeak.say(text, "en-us+robosoft", rate_wpm=145), 16000)
        name = f"{i}.wav"
        lines.append({"audio": name, "text": text, "answer": text, "answer_audio": name})
    (root / "bad.wav").write_bytes(b"RIFF nothing")
    lines.append({"task": "asr", "audio": "bad.wav", "text": "unheard"})
    written = [json.dumps(line) for line in lines]
    (root / "test.jsonl").write_text("\n".join([*written, "{"]) + "\n")
    return root / "test.jsonl"


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_every_task_end_to_end(kind: str, tiny_dir: Path, bundle: Path, data: Path, tmp_path: Path) -> None:
    source = tiny_dir if kind == "checkpoint" else bundle
    rows = tmp_path / "rows.jsonl"
    args = (source, "--data", data, "--recogniser", "pocketsphinx", "--json", "--rows", rows, *BOUNDS)
    result = edgeomni("evaluate", *args)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == ["sources"]
    (only,) = found["sources"]
    assert only["source"] == str(source) and only["recogniser"] == "pocketsphinx" and only["left_out"] == {}
    assert {task: entry["samples"] for task, entry in only["tasks"].items()} == dict.fromkeys(
        ("asr", "at", "aa", "tt", "ta"), 3
    )
    for task in ("aa", "ta"):
        figures = only["tasks"][task]["metrics"]
        assert figures["ceiling_exact"] == {"value": 1, "samples": 3}, "espeak-ng is heard right"
        assert figures["heard_exact"]["value"] == 0, "random weights say nothing"
        assert {"floor_exact", "floor_wer", "heard_cer", "f1", "exact"} <= set(figures)
        assert only["tasks"][task]["timings"]["ttfa"] > 0
    assert [(Path(e["where"]).name, e["task"]) for e in only["unusable"]] == [
        ("test.jsonl:5", ""),
        ("test.jsonl:4", "asr"),
    ]
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 15 and {line["source"] for line in lines} == {str(source)}
    assert [line["reference"] for line in lines if line["task"] == "aa"] == TEXTS
    assert all(line["heard_reference"] == line["reference"] for line in lines if line["task"] == "ta")
    assert "aa 3 of 3" in result.stderr and "test.jsonl:4: cannot be used for asr" in result.stderr


def test_two_sources_are_compared(tiny_dir: Path, bundle: Path, data: Path) -> None:
    args = ("evaluate", tiny_dir, bundle, "--data", data, "--task", "tt", "--task", "asr", "--limit", 2, *BOUNDS)
    found = json.loads(edgeomni(*args, "--json").stdout)
    assert [entry["source"] for entry in found["sources"]] == [str(tiny_dir), str(bundle)]
    differences = {(d["task"], d["metric"]): d for d in found["comparison"]["differences"]}
    assert set(differences) == {("asr", "wer"), ("asr", "cer"), ("tt", "exact"), ("tt", "f1")}
    assert differences["tt", "f1"]["samples"] == 2
    assert all(d["low"] <= d["difference"] <= d["high"] for d in differences.values())
    shown = edgeomni("evaluate", tiny_dir, bundle, "--data", data, "--task", "tt", "--limit", 1, *BOUNDS).stdout
    for words in (
        "what it writes",
        "medians over the answers",
        f"A: {tiny_dir}\nB: {bundle}\n",
        "too few samples",
        "95 % interval",
    ):
        assert words in shown


def test_tables_show_answer_ceiling_and_floor(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = edgeomni("evaluate", bundle, "--data", data, "--task", "ta", "--recogniser", "pocketsphinx", *BOUNDS).stdout
    assert "ta: what pocketsphinx hears" in shown and "1 samples could not be used" in shown
    row = next(line for line in shown.splitlines() if "heard exactly right" in line)
    assert "0.0" in row and "100.0" in row


def test_a_command_may_be_the_recogniser(bundle: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "hear.py").write_text("print('The Answer is Twelve.')")
    hear = f"'{sys.executable}' '{tmp_path / 'hear.py'}'"
    args = ("evaluate", bundle, "--data", data, "--task", "ta", "--json", *BOUNDS)
    found = json.loads(edgeomni(*args, "--recogniser", hear).stdout)["sources"][0]["tasks"]["ta"]["metrics"]
    assert found["heard_exact"]["value"] == found["ceiling_exact"]["value"] == pytest.approx(1 / 3)
    assert found["floor_exact"]["value"] == pytest.approx(1 / 3), (
        "whoever says always the same is right as often by chance"
    )
    (tmp_path / "hear.py").write_text("import sys; sys.exit('out of order')")
    failed = edgeomni(*args, "--recogniser", hear)
    assert failed.exit_code == 1 and "out of order" in failed.stderr and failed.stdout == ""
    (tmp_path / "hear.py").write_text("import time; time.sleep(60)")
    slow = edgeomni(*args, "--recogniser", hear, "--recogniser-timeout", 0.5)
    assert slow.exit_code == 1 and "did not answer within 0.5 s" in slow.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--max-bad", 0], 1, "more than 0 records cannot be used"),
        (["--max-bad", 1], 1, "2 sample(s) cannot be used, and at most 1 may be"),
        (["--recogniser", "no-such-hearer"], 2, "no such program"),
        (["--format", "nonsense"], 2, "nonsense"),
        (["--engine", "torch", "--task", "tt"], 2, "torch"),
        (["--seed", -1], 2, "seed"),
    ],
)
def test_what_cannot_be_done_is_said(bundle: Path, data: Path, args: list[Any], code: int, said: str) -> None:
    result = edgeomni("evaluate", bundle, "--data", data, *BOUNDS, *args)
    assert result.exit_code == code and said in result.stderr and result.stdout == ""


def test_rows_replace_nothing_without_force(bundle: Path, data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "rows.jsonl"
    mine.write_text("mine")
    args = ("evaluate", bundle, "--data", data, "--task", "tt", "--rows", mine, *BOUNDS)
    refused = edgeomni(*args)
    assert refused.exit_code == 2 and "--force" in refused.stderr and mine.read_text() == "mine"
    assert edgeomni(*args, "--force").exit_code == 0 and len(mine.read_text().splitlines()) == 3


def test_a_bundle_is_evaluated_without_torch(bundle: Path, data: Path) -> None:
    args = ["evaluate", str(bundle), "--data", str(data), "--recogniser", "pocketsphinx", *map(str, BOUNDS)]
    code = (
        f"import sys; from edgeomni.cli import main; main({args!r}, standalone_mode=False); "
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'a device needs none of these'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_greedy_answers_are_the_same_every_time(bundle: Path, data: Path) -> None:
    args = ("evaluate", bundle, bundle, "--data", data, "--task", "at", "--json", *BOUNDS)
    for difference in json.loads(edgeomni(*args).stdout)["comparison"]["differences"]:
        np.testing.assert_array_equal([difference[k] for k in ("difference", "low", "high")], 0)
