"""Directories that look as if optimum had made them: every damage and every foreign graph is an error with its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from optimum_shelf import FORMATS, composed, needs_openvino, unpacked

from edgeomni.errors import CheckpointError
from edgeomni.model import parts as sources

GRAPHS = {"whisper": "encoder_model.onnx", "qwen2": "model.onnx"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return unpacked(tmp_path / "own", "onnx")


def read(directory: Path) -> None:
    source = str(directory)
    if directory.name == "whisper":
        sources.read_encoder(source, sources.check_encoder(source))
    else:
        sources.read_llm(source, sources.check_llm(source))


def rewritten(own: Path, part: str, change: Callable[[onnx.GraphProto], None]) -> None:
    path = own / part / GRAPHS[part]
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def forget_modules(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = node.name.replace("q_proj", "x")


def quantize(graph: onnx.GraphProto) -> None:
    graph.node[5].op_type = "MatMulInteger"


def break_a_shape(graph: onnx.GraphProto) -> None:
    next(t for t in graph.initializer if len(t.dims) == 2).dims[0] += 1


def add_an_input(graph: onnx.GraphProto) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("surprise", onnx.TensorProto.FLOAT, [1]))
    graph.node.append(onnx.helper.make_node("Identity", ["surprise"], ["surprised"]))


@pytest.mark.parametrize("part", list(GRAPHS))
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (forget_modules, r"holds no tensor that could be .*q_proj"),
        (quantize, "quantized"),
        (break_a_shape, "holds no tensor|cannot be read"),
    ],
)
def test_graphs_of_another_kind_are_refused(own: Path, part: str, change: Any, said: str) -> None:
    rewritten(own, part, change)
    with pytest.raises(CheckpointError, match=said):
        read(own / part)


@pytest.mark.parametrize("part", list(GRAPHS))
def test_a_graph_that_wants_more_than_is_known_is_refused(own: Path, part: str) -> None:
    rewritten(own, part, add_an_input)
    with pytest.raises(CheckpointError, match=rf"{GRAPHS[part]}: cannot be run \(the graph has an input 'surprise'"):
        composed(own)


@pytest.mark.parametrize("size", [0, 100, 20_000])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_refused(tmp_path: Path, kind: str, size: int) -> None:
    shelf = unpacked(tmp_path / kind, kind)
    files = [f for f in (shelf / "whisper").iterdir() if f.suffix in (".onnx", ".xml", ".bin")]
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="/whisper"):
            read(shelf / "whisper")
        file.write_bytes(whole)
    assert files


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<?xml", "<!DOCTYPE x><?xml", "document type"),
        ('element_type="f16" shape="8, 8"', 'element_type="u8" shape="8, 8"', "quantized"),
        ('offset="', 'offset="9', "truncated|cannot be read"),
        ('size="', 'size="9', "bytes"),
        ("edges>", "ways>", "holds no tensor"),
    ],
)
@needs_openvino
def test_damaged_openvino_graphs_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    shelf = unpacked(tmp_path / "openvino", "openvino")
    graph = shelf / "whisper" / "openvino_encoder_model.xml"
    text = graph.read_text(encoding="utf-8")
    assert old in text
    graph.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        read(shelf / "whisper")
