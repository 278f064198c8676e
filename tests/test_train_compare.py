"""Runs side by side: figures worked out by hand from logs laid down by hand, and folders that are no runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeomni.cli import main
from edgeomni.cli.evaluate import _as_json
from edgeomni.errors import TrainError, UsageError
from edgeomni.evaluate.metrics import Share
from edgeomni.evaluate.result import Evaluation, Row
from edgeomni.train.compare import compare, load

CONFIG = 'stage = "3"\nseed = 0\n\n[optimizer]\nsteps = 40\nlr = 0.001\n\n[tasks]\nasr = 1.0\n'
LOG: list[dict[str, Any]] = [
    {"step": 10, "loss": 3.0, "frames": 1000, "seconds": 100.0},
    {"step": 20, "loss": 1.0, "frames": 3000, "seconds": 110.0},
    {"step": 20, "eval_loss": 2.0, "frames": 3000, "seconds": 150.0},
    {"step": 30, "loss": 1.5, "frames": 5000, "seconds": 160.0},
    {"step": 30, "eval_loss": 2.5, "frames": 5000, "seconds": 200.0},
    {"step": 40, "loss": None, "frames": 500, "seconds": 30.0},
    {"step": 40, "loss": 2.0, "frames": 2900, "seconds": 36.0},
]
"""Resumed after step 30. Between lines that trained: 2000 + 2000 + 2400 frames in 10 + 10 + 6 s."""


def run(path: Path, config: str = CONFIG, log: list[dict[str, Any]] = LOG, **documents: Any) -> Path:
    path.mkdir()
    (path / "config.toml").write_text(config)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for name, document in documents.items():
        (path / f"{name.replace('_', '-')}.json").write_text(json.dumps(document))
    return path


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, ["compare-runs", *map(str, args)], catch_exceptions=False)


def test_figures_by_hand(tmp_path: Path) -> None:
    found = load(str(run(tmp_path / "a")))
    assert found.figures == {
        "steps": 40,
        "training loss, last": 2.0,
        "training loss, best": 1.0,
        "training loss, best at step": 20,
        "validation loss, last": 2.5,
        "validation loss, best": 2.0,
        "validation loss, best at step": 20,
        "tokens per second": pytest.approx((2000 + 2000 + 2400) / 26, abs=0.05),
        "seconds": 236.0,
    }
    assert found.shares == {}


def test_a_run_that_logged_little_has_gaps(tmp_path: Path) -> None:
    figures = load(str(run(tmp_path / "a", log=[{"step": 1, "loss": 2.0, "frames": 10, "seconds": 1.0}]))).figures
    assert figures["training loss, best"] == 2.0 and figures["validation loss, best"] is None
    assert figures["tokens per second"] is None and figures["seconds"] == 1.0
    empty = load(str(run(tmp_path / "b", log=[]))).figures
    assert empty["steps"] == 0 and empty["training loss, last"] is None and empty["seconds"] == 0


def test_evaluations_are_found(tmp_path: Path) -> None:
    ability = {"before": {"exact": 0.5, "f1": 0.75, "samples": 20}, "after": {"exact": 0.25, "f1": 0.5, "samples": 20}}
    asr = {"tasks": {"asr": {"samples": 4, "metrics": {"wer": {"value": 0.125, "samples": 4}}}}, "source": "x"}
    found = load(str(run(tmp_path / "a", evaluation=ability, evaluation_test={"sources": [asr]})))
    assert list(found.shares.items()) == [
        ("text before: exactly right", 0.5),
        ("text after: exactly right", 0.25),
        ("text before: token F1", 0.75),
        ("text after: token F1", 0.5),
        ("test, asr: word error rate", 0.125),
    ]


def test_what_the_evaluator_prints_is_understood(tmp_path: Path) -> None:
    """The evaluator's own document, so that a change of it is seen here."""
    rows = [
        Row(i, "tt", f"t:{i}", "a", "a", None, None, None, "eot", {"exact": Share(i, 1), "f1": Share(0.5, 1)}, {})
        for i in (0, 1)
    ]
    folder = run(tmp_path / "a", evaluation_x=_as_json([Evaluation("ckpt", tuple(rows))], None))
    assert load(str(folder)).shares == {"x, tt: exactly right": 0.5, "x, tt: token F1": 0.5}


def test_differences_of_configurations(tmp_path: Path) -> None:
    a = run(tmp_path / "a")
    b = run(tmp_path / "b", CONFIG.replace("0.001", "0.01").replace("asr = 1.0", "aa = 2.0"))
    c = run(tmp_path / "c")
    assert compare([a, b, c]).differs == {
        "optimizer.lr": [0.001, 0.01, 0.001],
        "tasks.asr": [1.0, None, 1.0],
        "tasks.aa": [None, 2.0, None],
    }
    assert compare([a, c]).differs == {}


def test_tables_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = run(Path("a"), evaluation={"before": {"exact": 0.5}, "after": {"exact": 0.4}})
    b = run(Path("b"), CONFIG.replace("0.001", "0.01"), LOG[:2])
    shown = cli(a, b, "-o", tmp_path / "cmp.png")
    assert shown.exit_code == 0 and (tmp_path / "cmp.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.stdout.splitlines() if "│" in line}
    cells = {name: [cell.strip() for cell in row] for name, row in lines.items()}
    assert cells["optimizer.lr"] == ["0.001", "0.01"]
    assert cells["validation loss, best"] == ["2", "-"] and cells["time"] == ["0:03:56", "0:01:50"]
    assert cells["text before: exactly right"] == ["50.0 %", "-"]
    assert cells["text after: exactly right"] == ["40.0 %", "-"]
    assert "stage" not in cells
    again = cli(a, b, "-o", tmp_path / "cmp.png")
    assert again.exit_code == 2 and "exists" in again.stderr and not again.stdout
    assert cli(a, b, "-o", tmp_path / "cmp.png", "--force").exit_code == 0


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a\x1b[31m"), run(tmp_path / "[bold]b", CONFIG.replace('"3"', '"[red]\\u001b[1m"'))
    shown = cli(a, b)
    assert "\x1b" not in shown.stdout and "[bold]b" in shown.stdout and "[red]" in shown.stdout


def test_json(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", evaluation={"after": {"f1": 1}}), run(tmp_path / "b", CONFIG.replace('"3"', '"1"'))
    told = json.loads(cli(a, b, "--json").stdout)
    assert told["differs"] == {"stage": ["3", "1"]}
    assert [entry["run"] for entry in told["runs"]] == [str(a), str(b)]
    assert told["runs"][0]["validation loss, best"] == 2.0
    assert [entry["evaluated"] for entry in told["runs"]] == [{"text after: token F1": 1.0}, {}]


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    a = run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for other, said in (("empty", "no config.toml and no log.jsonl"), ("none", "no config.toml and no log.jsonl")):
        with pytest.raises(UsageError, match=f"{other} is no training run .it has {said}"):
            compare([a, tmp_path / other])
    (a / "log.jsonl").unlink()
    refused = cli(a, run(tmp_path / "b"))
    assert refused.exit_code == 2 and "no training run (it has no log.jsonl)" in refused.stderr
    with pytest.raises(UsageError, match="two or more different runs"):
        compare([tmp_path / "b"])
    with pytest.raises(UsageError, match="two or more different runs"):
        compare([tmp_path / "b", tmp_path / "b"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.toml", "stage = ", "config.toml: not valid TOML"),
        ("log.jsonl", '{"step": 1}\n[]\n', "log.jsonl:2: holds a list"),
        ("evaluation.json", "{", "evaluation.json: not valid JSON"),
        ("evaluation.json", '{"before": [1]}', "evaluation.json: before: must be an object"),
        ("evaluation.json", '{"after": {"exact": "all"}}', "after.exact: must be a number, not 'all'"),
        ("evaluation-x.json", '{"sources": [{"tasks": {"tt": []}}]}', "x.json: tasks.tt.metrics: must be an object"),
        ("evaluation-x.json", '{"sources": [{"tasks": []}]}', "x.json: tasks: must be an object"),
        ("evaluation-x.json", '{"sources": [[]]}', "x.json: tasks: must be an object"),
        ("evaluation-x.json", '{"sources": [{}, {}]}', "prints of one source"),
        ("evaluation-x.json", '{"tasks": {}}', "prints of one source"),
        ("evaluation-x.json", '{"sources": [{"tasks": {"tt": {"metrics": {"f1": 1}}}}]}', "f1: must be a number"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    (b / name).write_text(text)
    with pytest.raises(TrainError, match=said):
        compare([a, b])
