"""`export --judge`: what an export lost on a test set joins the gate, and a miss fails it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering import Ear, answering, tone
from click.testing import CliRunner, Result

from edgeomni import export
from edgeomni.bundle import Bundle
from edgeomni.cli import main
from edgeomni.cli.bundles import gate_table
from edgeomni.cli.legend import legend, verdict
from edgeomni.data.sample import Sample
from edgeomni.errors import DataError, EngineError, GateError, UsageError
from edgeomni.evaluate import metrics
from edgeomni.evaluate.lost import JudgeData, points_lost
from edgeomni.evaluate.run import Asking
from edgeomni.gate import judge
from edgeomni.gate.judge import GateOptions, Graded
from edgeomni.spec import AUDIO_OUT, TASKS

RIGHT = ["it is red", "it is green", "it is blue", "it is white"]
SHORT = Asking(max_seconds=0.3, max_length=100)


def samples(task: Any = "tt") -> list[Sample]:
    return [Sample(f"t:{i}", task, text="which", answer=answer) for i, answer in enumerate(RIGHT)]


def lost(data: JudgeData, original: Any, exported: Any) -> tuple[dict[str, float], dict[str, Any]]:
    return points_lost(original, exported, data, lambda _: None)


def test_points_are_hundredths_lost_against_the_original() -> None:
    original = answering(["it is red", "it is green", "it is blue", "no"], words=["which"])
    exported = answering(["it is red", "it is", "no", "no"], words=["which"])
    found, details = lost(JudgeData(samples()), original, exported)
    assert found == {"tt.exact": pytest.approx(50), "tt.f1": pytest.approx(100 * (3 - 1.8) / 4)}
    assert [d["metric"] for d in details["differences"]] == ["exact", "f1"]
    assert [entry["source"] for entry in details["evaluations"]] == ["original", "export"]
    json.dumps(details)
    assert "timings" not in json.dumps(details), "an export made again gives the same figures"
    gained, _ = lost(JudgeData(samples()), exported, original)
    assert gained["tt.exact"] == pytest.approx(-50)


def test_what_is_heard_is_judged_too_and_a_recogniser_serves_both_sides() -> None:
    sounds = [tone(i) for i in range(4)]
    ear = Ear(RIGHT)
    original = answering(RIGHT, sounds, ["which"])
    exported = answering(RIGHT, [*sounds[:3], sounds[0]], ["which"])
    found, _ = lost(JudgeData(samples("ta"), recogniser=ear), original, exported)
    assert found["ta.exact"] == 0 and found["ta.heard_exact"] == 25 and found["ta.heard_wer"] == pytest.approx(100 / 12)
    assert not [name for name in found if "floor" in name or "ceiling" in name]


def test_every_figure_of_every_task_has_limits() -> None:
    """The names are those that an evaluation measures; a name without a limit would be a miss."""
    every = set()
    for task in TASKS:
        names = list(metrics.written(task, "a", "a"))
        names += list(metrics.spoken("heard", "a", "a")) if task in AUDIO_OUT else []
        every |= {f"words.{task}.{name}" for name in names}
    assert {name for name in judge.known_names() if name.startswith("words.")} == every


def judged(points: float, bits: float, **how: Any) -> list[judge.Figure]:
    graded = {"tt": Graded("any", bits)}
    report = judge.judge({"words": {"tt.exact": points}}, graded, parts=(), **{"trained": True, **how})
    return report.missed


@pytest.mark.parametrize(("bits", "most"), [(32, 0.1), (16, 0.2), (8, 0.5), (4, 2.0)])
def test_limits_go_by_the_bits(bits: float, most: float) -> None:
    assert judged(most, bits) == [] and judged(-50.0, bits) == []
    (missed,) = judged(most + 0.01, bits)
    assert str(missed) == f"words tt.exact is {most + 0.01:g}, wanted ≤ {most:g}"
    assert len(judged(float("nan"), bits)) == 1


def test_limits_can_be_replaced_and_random_weights_are_not_judged() -> None:
    assert judged(5.0, 4, options=GateOptions({"words.tt.exact": 5.0})) == []
    assert judged(50.0, 4, trained=False) == []
    assert [f.name for f in judged(0.0, 2)] == ["tt.exact"], "no limits are known for two bits"


def test_without_a_test_set_nothing_is_wanted() -> None:
    report = judge.judge({}, {}, trained=True)
    assert "words" not in {figure.part for figure in report.figures}


# --- real exports


def data(**how: Any) -> JudgeData:
    return JudgeData(samples(), asking=SHORT, **how)


def trained(model: Any) -> Any:
    """A copy that counts as trained: its norms have moved."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(1.01)
    own.provenance = {**own.provenance, "weights": "trained"}
    return own


def test_a_random_export_records_its_words(tiny_model: Any, tmp_path: Path) -> None:
    steps: list[str] = []
    bundle = export.export_bundle(tiny_model, tmp_path / "b", judge=data(), threads=1, progress=steps.append)
    gate = Bundle.open(bundle.path).manifest.gate
    assert gate["passed"] and {e["verdict"] for e in gate["words"].values()} == {"not judged: random weights"}
    assert set(gate["words"]) == {"tt.exact", "tt.f1"} and gate["words"]["tt.exact"]["at_most"] == 2.0
    sources = [entry["source"] for entry in gate["details"]["words"]["evaluations"]]
    assert sources == ["original", "export"]
    assert len(steps) == export.STEPS + export.JUDGE_STEPS and "evaluate the export" in steps
    assert "words" in map(str, gate_table(gate).columns[1].cells) and "random" in verdict(gate)
    assert any(line.strip().startswith("words.tt.exact: points lost") for line in legend(gate))


def test_a_trained_export_that_answers_alike_passes_and_a_miss_keeps_nothing(tiny_model: Any, tmp_path: Path) -> None:
    model = trained(tiny_model)
    how: dict[str, Any] = {"precision": "fp32", "threads": 1, "judge": data()}
    gate = export.export_bundle(model, tmp_path / "good", **how).manifest.gate
    assert gate["words"]["tt.exact"] == {"value": 0.0, "at_most": 0.1, "verdict": "pass"}
    with pytest.raises(GateError, match="words tt.exact is 0, wanted ≤ -1"):
        export.export_bundle(model, tmp_path / "bad", gate=GateOptions({"words.tt.exact": -1}), **how)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_test_set_that_cannot_be_used_is_told_and_nothing_is_kept(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample could be used"):
        wordless = [Sample("t:1", "tt", text="which", answer="...")]
        export.export_bundle(tiny_model, tmp_path / "b", judge=JudgeData(wordless), threads=1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_told_before_anything_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds no samples"):
        JudgeData([])
    with pytest.raises(UsageError, match="no such program"):
        JudgeData(samples("ta"), recogniser="no-such-hearer")
    monkeypatch.setattr("edgeomni.evaluate.metrics.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"jiwer, which is not installed: pip install .*\[evaluate\]"):
        JudgeData(samples())


def edgeomni(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_the_command(tmp_path: Path) -> None:
    test_set = tmp_path / "test.jsonl"
    test_set.write_text("".join(json.dumps({"task": "tt", "text": "hi", "answer": a}) + "\n" for a in RIGHT))
    common = ("export", "--preset", "tiny", "--random", "-o", tmp_path / "b", "--threads", 1)
    done = edgeomni(*common, "--judge", test_set, "--judge-limit", 1)
    assert done.exit_code == 0 and "tt.exact" in done.stdout and "words" in done.stdout, done.output
    words = json.loads(edgeomni("inspect", tmp_path / "b", "--json").stdout)["gate"]["details"]["words"]
    assert words["differences"][0]["samples"] == 1
    assert np.isfinite(words["differences"][0]["difference"])
    alone = edgeomni(*common, "--force", "--recogniser", "pocketsphinx")
    assert alone.exit_code == 2 and "--recogniser belongs to --judge DATA" in alone.stderr
    missing = edgeomni(*common, "--force", "--judge", tmp_path / "none.jsonl")
    assert missing.exit_code == 1 and "none.jsonl" in missing.stderr
