"""`inspect` and `doctor`: most important first, in words, and whole on any terminal."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakes import small_bundle, small_spec
from rich.console import Console
from rich.table import Table

from edgeomni.cli import doctor, legend, main
from edgeomni.engines import ENGINES
from edgeomni.gate.judge import meanings
from edgeomni.install_hint import install_command
from edgeomni.printing import show

GATE = {
    "passed": True,
    "fidelity": {
        "llm.top1": {"value": 0.999, "at_least": 0.995, "verdict": "pass"},
        "encoder.altered": {"value": 0, "at_most": 0, "verdict": "pass"},
    },
    "quality": {"llm.kl": {"value": 0.25, "at_most": 0.02, "verdict": "not judged: random weights"}},
}
COMMAND = "edgeomni export CHECKPOINT -o BUNDLE --encoder onnx:int8 --llm onnx:int4 --codec onnx:fp32"


def edgeomni(*args: object, columns: int | None = None) -> Result:
    env = {"COLUMNS": str(columns)} if columns else {}
    return CliRunner(env=env).invoke(main, [str(a) for a in args])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that no engine could run: enough to look at."""
    return small_bundle(
        tmp_path / "bundle",
        small_spec(),
        licences={"llm": "[bold]Apache-2.0[/bold]"},
        gate=GATE,
        facts={"command": COMMAND},
        prefix="a-graph-with-a-name-longer-than-forty-columns-",
    )


def test_inspect_says_size_precision_and_verdict_first(bundle: Path) -> None:
    first = edgeomni("inspect", bundle).output.splitlines()[:3]
    assert first[0] == f"{bundle}: bundle, 0.00 MB"
    assert first[1] == "precision: encoder int8, llm int8, codec int8"
    assert first[2].startswith("gate: passed, all 2 figures judged") and "1 on quality not judged" in first[2]


def test_a_missed_or_absent_gate_is_said() -> None:
    missed = {"passed": False, "fidelity": {"llm.top1": {"value": 0.1, "at_least": 0.9, "verdict": "MISSED"}}}
    assert legend.verdict(missed) == "gate: MISSED by fidelity llm.top1; it was kept all the same (--no-gate)"
    assert "MISSED" in legend.verdict({**GATE, "passed": False})
    assert "not judged" in legend.verdict({}) and "passed" not in legend.verdict({})
    assert "not judged" not in legend.verdict({"passed": True, "fidelity": GATE["fidelity"]})


def test_a_gate_that_only_claims_to_have_passed_is_not_believed() -> None:
    assert "MISSED" in legend.verdict({"fidelity": GATE["fidelity"]}), "it does not say that it passed"
    assert "MISSED" in legend.verdict({**GATE, "fidelity": {"llm.top1": {"verdict": "MISSED: was not measured"}}})


def test_the_legend_explains_what_is_shown_once(bundle: Path) -> None:
    shown, known = edgeomni("inspect", bundle).output, meanings()
    words = [known["llm.top1"], known["encoder.altered"], known["quality.llm.kl"]]
    for sentence in (legend.PARTS["fidelity"], legend.PARTS["quality"], *words):
        assert shown.count(sentence) == 1
    assert known["codec.si_sdr"] not in shown and legend.PARTS["device"] not in shown


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_nothing_is_cut_on_any_terminal(bundle: Path, columns: int) -> None:
    shown = edgeomni("inspect", bundle, columns=columns).output
    path = "llm/a-graph-with-a-name-longer-than-forty-columns-text_head.onnx"
    for whole in (COMMAND, path, "all int8", "not judged: random weights", "[bold]Apache-2.0[/bold]", "at most 0.02"):
        assert whole in shown, whole
    assert "…" not in shown
    assert ("┃" in shown) == (columns == 200)


def test_a_table_that_does_not_fit_is_listed_by_its_columns() -> None:
    def shown(width: int, header: bool = True) -> str:
        table = Table("name", "size", "note", title="parts", show_header=header)
        table.add_row("encoder", "12\n34", "")
        table.add_row("llm", "5", "a rather long remark")
        out = Console(width=width, markup=False)
        with out.capture() as capture:
            show(out, table)
        return capture.get()

    assert shown(20) == ("parts:\n  encoder\n    size: 12, 34\n  llm\n    size: 5\n    note: a rather long remark\n")
    assert shown(20, header=False).splitlines()[2] == "  llm: 5 a rather long remark"
    assert "a rather long remark" in shown(80) and "│" in shown(80)


def test_json_holds_the_whole_manifest(bundle: Path) -> None:
    data = json.loads(edgeomni("inspect", bundle, "--json", columns=40).output)
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert {**manifest, "size": data["size"], "digest": data["digest"]} == data


# --- checkpoints


def kind_by_the_loader(path: Path) -> str | None:
    from edgeomni.model import checkpoints

    return checkpoints.kind_of(path)


def test_inspect_reads_our_own_checkpoint(tiny_dir: Path, tiny_model: Any) -> None:
    result = edgeomni("inspect", tiny_dir)
    lines = result.output.splitlines()
    assert result.exit_code == 0 and "checkpoint, EdgeOmni's own layout" in lines[0]
    assert lines[1] == "weights: random, so it answers noise until it is trained"
    data = json.loads(edgeomni("inspect", tiny_dir, "--json").output)
    stored = tiny_model.state_dict()
    assert data["kind"] == kind_by_the_loader(tiny_dir) == "edgeomni"
    assert sum(data["parameters"].values()) == sum(t.numel() for t in stored.values())
    assert data["parameters"]["codec"] == sum(t.numel() for n, t in stored.items() if n.startswith("codec."))
    assert data["spec"]["body"]["layers"] == 3 and "3 layers, width 128" in data["sizes"]["body"]
    assert data["files"]["model.safetensors"] == (tiny_dir / "model.safetensors").stat().st_size


def test_inspect_reads_a_recipe(tmp_path: Path) -> None:
    from edgeomni.model import checkpoints

    checkpoints.save_preset("mini-omni", 3, tmp_path / "recipe")
    data = json.loads(edgeomni("inspect", tmp_path / "recipe", "--json").output)
    assert data["kind"] == kind_by_the_loader(tmp_path / "recipe") == "preset"
    assert data["provenance"] == {"preset": "mini-omni", "seed": 3} and "noise" in data["weights"]
    assert data["spec"]["body"]["width"] == 896 and data["spec"]["codec"]["sample_rate"] == 24000
    old = {"format": "edgeomni-checkpoint", "version": 1, "preset": "tiny", "seed": 0}
    (tmp_path / "recipe" / "config.json").write_text(json.dumps(old))
    assert "sizes: not stated" in edgeomni("inspect", tmp_path / "recipe").output


def test_inspect_reads_the_released_layout(golden: Any, tmp_path: Path) -> None:
    data = json.loads(edgeomni("inspect", golden.path, "--json").output)
    assert data["kind"] == kind_by_the_loader(golden.path) == "mini-omni" and data["weights"] == "trained"
    assert "2 layers" in data["sizes"]["body"] and "24000 Hz" in data["sizes"]["codec"]
    (tmp_path / "model_config.yaml").write_text("n_layer: 2\n")
    result = edgeomni("inspect", tmp_path)
    assert "weights: incomplete: lit_model.pth, tokenizer.json, a Whisper *.pt, SNAC's config.json" in result.output


def test_inspect_reads_parts(tmp_path: Path) -> None:
    configs = {
        "encoder": {"model_type": "whisper", "encoder_layers": 12, "d_model": 768},
        "llm": {"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896},
        "codec": {"sampling_rate": 24000, "codebook_size": 4096, "vq_strides": [4, 2, 1]},
    }
    for part, config in configs.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": {"shape": [3, 4]}, "b": {"shape": []}}).encode()
    (tmp_path / "llm" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    data = json.loads(edgeomni("inspect", tmp_path, "--json").output)
    assert data["kind"] == kind_by_the_loader(tmp_path) == "parts" and "noise" in data["weights"]
    assert data["parameters"] == {"llm": 13}
    assert data["sizes"] == {
        "encoder": "whisper, 12 layers, width 768",
        "llm": "qwen2, 24 layers, width 896",
        "codec": "snac, 4096 codebook entries",
    }


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tiny_dir: Path) -> None:
    for path, said in ((tmp_path / "gone", "no such bundle or checkpoint"), (tmp_path, "neither a bundle")):
        result = edgeomni("inspect", path)
        assert result.exit_code == 1 and said in result.stderr
    config = (tiny_dir / "config.json").read_text()
    for weights, wrong in ((b"", config), (b"\xff" * 100, config), (b"\x02" + b"\0" * 7 + b"{", config), (None, "{}")):
        (tmp_path / "config.json").write_text(wrong)
        if weights is not None:
            (tmp_path / "model.safetensors").write_bytes(weights)
        result = edgeomni("inspect", tmp_path)
        assert result.exit_code == 1 and "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    spoilt = json.loads(config)
    spoilt["spec"]["layout"]["streams"] = 6
    (tmp_path / "config.json").write_text(json.dumps(spoilt))
    assert "contradict each other" in edgeomni("inspect", tmp_path).stderr


def test_our_own_layouts_are_inspected_without_torch(tiny_dir: Path, tmp_path: Path) -> None:
    from edgeomni.model import checkpoints

    recipe = checkpoints.save_preset("tiny", 0, tmp_path / "recipe")
    code = (
        "import sys; from edgeomni.cli import main\n"
        f"for path in {[str(tiny_dir), str(recipe)]!r}: main(['inspect', path], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'safetensors', 'onnxruntime'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("width 128") == 2


# --- doctor


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine about which little can be found out, with nothing but EdgeOmni's own code installed."""
    from edgeomni.hardware import Machine

    machine = Machine("Linux-6", "Chip [X]", 1, (), None, None, None)
    monkeypatch.setattr(doctor, "detect", lambda: machine)
    monkeypatch.setattr(doctor, "closest_profile", lambda machine: None)
    monkeypatch.setattr(doctor, "installed_version", lambda names: "")
    monkeypatch.setattr(doctor, "_providers", lambda: [])


def test_doctor_speaks_in_words(bare: None) -> None:
    shown = edgeomni("doctor", columns=100).output
    for words in (
        "processor: Chip [X], 1 core to use",
        "vector instructions: none that matter here",
        "memory: the system does not tell",
        "GPU: none found",
        "closest hardware profile: none fits",
    ):
        assert words in shown.splitlines(), words
    assert "None" not in shown and "board" not in shown and "'" not in shown


def test_doctor_names_instruction_sets_and_memory(monkeypatch: pytest.MonkeyPatch, bare: None) -> None:
    from edgeomni.hardware import Machine

    machine = Machine("Linux-6", "Chip", 4, ("avx2", "avx512_vnni", "new9"), 15.6, "NVIDIA T4", "Jetson")
    monkeypatch.setattr(doctor, "detect", lambda: machine)
    lines = edgeomni("doctor").output.splitlines()
    assert "vector instructions: AVX2, AVX-512 VNNI, new9" in lines and "processor: Chip, 4 cores to use" in lines
    assert "memory: 15.6 GB" in lines and "GPU: NVIDIA T4" in lines and "board: Jetson" in lines


@pytest.mark.parametrize("columns", [40, 60])
def test_doctor_knows_every_engine_and_its_commands_are_whole(bare: None, columns: int) -> None:
    shown = edgeomni("doctor", columns=columns).output
    for engine in ENGINES.values():
        assert engine.name in shown and f"  {engine.install}" in shown.splitlines()
    assert "…" not in shown and f"  {install_command('play')}" in shown.splitlines()
    report = json.loads(edgeomni("doctor", "--json").output)
    assert list(report["engines"]) == list(ENGINES) and report["machine"]["closest_profile"] is None
