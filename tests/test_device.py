"""A bundle on a device: the command line answers from it in a process that cannot import torch or its company.

`make test-pythons` runs this on every Python of the machine, with a device's dependencies and nothing else; there the
bundles were exported beforehand, and DEVICE_BUNDLES names their folder. In the usual run they are exported here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import Golden

from edgeomni.engines import COMPONENTS, release
from edgeomni.onnx_files import NEW_OPSET_NEEDS

EXPORTED_BEFORE = "EDGEOMNI_DEVICE_BUNDLES"
PRECISIONS = ("fp32", "int4") if EXPORTED_BEFORE in os.environ else ("fp32",)
NEW_GRAPHS = ("portable", "tensorrt") if EXPORTED_BEFORE in os.environ else ()
"""The usual run exports one bundle alone, since other tests answer from the rest."""
PORTABLE, OPENVINO = {"onnx": {"flavour": "portable"}}, {"encoder": "openvino:fp32", "llm": "onnx:fp32"}
EXPORTED: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int4": {"precision": "int4"},
    "portable": {"precision": "fp32", "options": PORTABLE},
    "tensorrt": {"precision": "fp32", "formats": dict.fromkeys(COMPONENTS, "tensorrt:fp32")},
    "openvino": {"precision": "fp32", "formats": {**OPENVINO, "codec": "openvino:fp32"}},
}
"""What a bundle is called -> how `export_bundle` makes it. OpenVINO's has the LLM of ONNX, as is fastest on a CPU."""
TIMEOUT_S = 3000.0
"""For one command, which an emulated processor takes minutes for."""
ABSENT = ("onnx", "snac", "torch", "transformers")
"""What a device does not have."""
COMMAND = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from edgeomni.cli import main
main()
"""


@pytest.fixture(scope="module")
def bundles(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle of the golden layout in every precision, as {layout}-{precision}."""
    if EXPORTED_BEFORE in os.environ:
        return Path(os.environ[EXPORTED_BEFORE])
    from edgeomni.export import export_bundle

    folder = tmp_path_factory.mktemp("device")
    for name in PRECISIONS:
        export_bundle(golden.path, folder / f"{golden.path.name}-{name}", **EXPORTED[name])
    return folder


def command_line(*args: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", COMMAND, *map(str, args)]
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def edgeomni(*args: object) -> str:
    """Standard output of the command, which succeeds."""
    done = command_line(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(golden: Golden, source: Path, task: str, tokens: Path) -> tuple[object, ...]:
    """The arguments that make the bundle answer as the published code did."""
    limit, question = golden.meta["max_returned_tokens"], golden.path / "question.wav"
    return "run", source, question, "--task", task, "--greedy", "--max-length", limit, "--tokens-out", tokens


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("task", "name"), [("aa", "BATCH"), ("asr", "ASR")])
def test_an_answer(task: str, name: str, precision: str, golden: Golden, bundles: Path, tmp_path: Path) -> None:
    """fp32 gives the published code's ids on every version of everything; the rounded ones an answer of their own."""
    tokens, wave = tmp_path / "tokens.npz", tmp_path / "answer.wav"
    sound = ("-o", wave) if task == "aa" else ()
    edgeomni(*asked(golden, bundles / f"{golden.path.name}-{precision}", task, tokens), *sound)
    ids, expected = np.load(tokens)["tokens"], golden[f"{name}_tokens"]
    assert ids.ndim == expected.ndim and ids.shape[-1] > 0
    if precision == "fp32":
        np.testing.assert_array_equal(ids, expected)
    if sound:
        samples, rate = soundfile.read(wave)
        streams = len(ids) - 1  # stream k starts k + 1 frames late, so this many frames complete no codec frame
        per_frame = len(golden["AA_wave"]) / (golden["AA_tokens"].shape[1] - streams)
        assert rate == 24000 and len(samples) == per_frame * max(0, ids.shape[1] - streams)
        assert samples.any() or precision != "fp32", "a random model in int4 may end its answer before any audio"


@pytest.mark.parametrize("name", NEW_GRAPHS)
def test_graphs_of_a_newer_opset(name: str, golden: Golden, bundles: Path, tmp_path: Path) -> None:
    """They give the published code's ids, or an error that says which ONNX Runtime and which Python they need."""
    import onnxruntime

    source = bundles / f"{golden.path.name}-{name}"
    done = command_line(*asked(golden, source, "asr", tmp_path / "tokens.npz"))
    if release(onnxruntime.__version__) >= NEW_OPSET_NEEDS:
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.load(tmp_path / "tokens.npz")["tokens"], golden["ASR_tokens"])
        return
    assert done.returncode == 1 and "Traceback" not in done.stderr
    python = "none for Python 3.10: take Python 3.11 or newer" if sys.version_info < (3, 11) else "update it"
    assert "need ONNX Runtime 1.25 or newer" in done.stderr and python in done.stderr, done.stderr
    opened = command_line("verify", source, "--load")
    assert opened.returncode == 1 and "cannot be opened here" in opened.stderr and "Do not run" not in opened.stderr


def test_openvino_beside_onnxruntime(golden: Golden, bundles: Path, tmp_path: Path) -> None:
    """The encoder and the codec on OpenVINO, the LLM on ONNX Runtime: the published code's ids again."""
    pytest.importorskip("openvino", reason="needs OpenVINO: the extra [openvino]")
    source = bundles / f"{golden.path.name}-openvino"
    if not source.is_dir():
        pytest.skip("no such bundle was exported; other tests answer from one")
    tokens, wave = tmp_path / "tokens.npz", tmp_path / "answer.wav"
    edgeomni(*asked(golden, source, "aa", tokens), "-o", wave)
    np.testing.assert_array_equal(np.load(tokens)["tokens"], golden["BATCH_tokens"])
    assert soundfile.read(wave)[0].any()


def test_a_profile_is_remembered(
    golden: Golden, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`profile` measures in a process of its own, and keeps the figures for the choice of engines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = bundles / f"{golden.path.name}-{PRECISIONS[-1]}"
    brief = ("--turns", 1, "--warmup", 0, "--seconds", 0.5, "--forced-frames", 4, "--json")
    report = json.loads(edgeomni("profile", source, *brief))
    (kept,) = (tmp_path / "edgeomni" / "profiles").rglob("*.json")
    run = json.loads(kept.read_text())
    assert set(run["ways"].values()) == {f"onnxruntime on cpu (onnx:{p})" for p in _precisions(source)}
    assert run["stages"]["frame"] > 0 and report


def _precisions(source: Path) -> set[str]:
    return {part["precision"] for part in json.loads((source / "bundle.json").read_text())["components"].values()}


def test_the_other_commands(golden: Golden, bundles: Path) -> None:
    source = bundles / f"{golden.path.name}-{PRECISIONS[-1]}"
    edgeomni("verify", source)
    assert PRECISIONS[-1] in edgeomni("inspect", source)
    report = json.loads(edgeomni("doctor", "--json"))
    assert report["engines"]["onnxruntime"]["version"] and report["providers"]
