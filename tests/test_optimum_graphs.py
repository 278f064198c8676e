"""Which graph stands for a part, what counts as the same answer, and graphs whose process gives none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_onnx import node, saved

from edgeomni.errors import CheckpointError
from edgeomni.model import optimum_graphs
from edgeomni.model.optimum_graphs import GraphWeights, _compared, _run, graph_of

GRAPH = Path("model.onnx")


def holding(folder: Path, *names: str) -> str:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return str(folder)


def test_the_graph_of_a_part_is_onnx_s_and_then_openvino_s(tmp_path: Path) -> None:
    source = holding(tmp_path / "a", "openvino_model.xml", "encoder_model.onnx", "config.json")
    assert graph_of(source, "llm") == tmp_path / "a" / "openvino_model.xml"
    assert graph_of(source, "encoder") == tmp_path / "a" / "encoder_model.onnx"
    holding(tmp_path / "a", "model.onnx", "openvino_encoder_model.xml")
    assert graph_of(source, "llm") == tmp_path / "a" / "model.onnx"
    assert graph_of(source, "encoder") == tmp_path / "a" / "encoder_model.onnx"
    assert graph_of(holding(tmp_path / "b", "config.json"), "llm") is None
    assert graph_of("openai/whisper-tiny", "encoder") is None


@pytest.mark.parametrize("end", ["", ".index.json"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_no_graph_stands_for_a_part_that_has_weights_of_torch(name: str, end: str, tmp_path: Path) -> None:
    assert graph_of(holding(tmp_path / "a", "model.onnx", name + end), "llm") is None


@pytest.mark.parametrize(("kind", "limit"), [(np.float32, 1e-3), (np.float16, 3e-2)])
def test_answers_may_differ_by_rounding_of_their_largest_number(kind: Any, limit: float) -> None:
    theirs = np.array([[-64.0, 1.0, 2.0]], kind)
    for share in (0.0, 0.9):
        ours = theirs.astype(np.float32) + np.array([[0, -share * limit * 64, 0]], np.float32)
        assert _compared(GRAPH, ours, theirs) == pytest.approx(share * limit, rel=1e-3)
    for wrong in (1.1 * limit * 64, np.nan, np.inf):
        ours = theirs.astype(np.float32) + np.array([[0, wrong, 0]], np.float32)
        with pytest.raises(CheckpointError, match="answers otherwise than the graph itself"):
            _compared(GRAPH, ours, theirs)
    zeros = np.zeros((1, 3), np.float32)
    assert _compared(GRAPH, zeros, zeros) == 0
    with pytest.raises(CheckpointError, match="answers otherwise"):
        _compared(GRAPH, zeros + np.float32(1e-6), zeros)


@pytest.mark.parametrize("theirs", [np.zeros((2, 3)), np.zeros((3, 2), np.float32), np.zeros(6, np.float32)])
def test_answers_of_another_kind_or_shape_are_not_compared(theirs: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match=r"where \(2, 3\) in float32 or float16 is expected"):
        _compared(GRAPH, np.zeros((2, 3), np.float32), theirs)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.stderr.write('a trace\\nwhat it died of\\n'); sys.exit(3)", r"cannot be run \(what it died of\)"),
        ("sys.exit(3)", r"cannot be run \(its process ended with 3\)"),
        ("pass", r"cannot be run \(its process ended with 0\)"),
        ("numpy.save(sys.argv[3], numpy.zeros(1)); sys.exit(3)", r"cannot be run \(its process ended with 3\)"),
        ("import time; time.sleep(60)", "gave no answer within 1 s"),
    ],
)
def test_a_graph_whose_process_gives_no_answer(code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", f"import sys, numpy; {code}"]
    monkeypatch.setattr(optimum_graphs, "module_command", lambda module, *given: [*command, *given])
    if "sleep" in code:
        monkeypatch.setattr(optimum_graphs, "_TIMEOUT_S", 1)
    with pytest.raises(CheckpointError, match=rf"^model\.onnx: {said}"):
        _run(GRAPH, {"ids": np.arange(3)})


def test_a_process_gets_what_is_given_and_its_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, numpy; numpy.save(sys.argv[3], 2 * numpy.load(sys.argv[2])['ids'])"
    monkeypatch.setattr(optimum_graphs, "module_command", lambda module, *given: [sys.executable, "-c", code, *given])
    np.testing.assert_array_equal(_run(GRAPH, {"ids": np.arange(3)}), [0, 2, 4])


def test_weights_of_a_graph_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"model\.onnx: damaged, or no graph that optimum wrote"):
        GraphWeights(tmp_path / "model.onnx")
    weights = GraphWeights(saved(tmp_path / "w.onnx", [node("Add", "x", "w")], {"w": np.array([1, 2], np.float32)}))
    assert weights.read({"fc.bias": (2,)})["fc.bias"].tolist() == [1, 2]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(CheckpointError, match=r"openvino_model\.xml: OpenVINO is needed to check what is read"):
        GraphWeights(tmp_path / "openvino_model.xml")
