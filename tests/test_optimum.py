"""Directories that `optimum-cli export onnx|openvino` made, as encoder and LLM. tests/optimum_directories.py made them.

What is expected was computed by the transformers of that other environment, from the weights before they were exported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import parts
import pytest
import torch
from optimum_shelf import FORMATS, composed, misses, unpacked

from edgeomni.errors import CheckpointError
from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.model import checkpoints
from edgeomni.model.optimum_graphs import held_against
from edgeomni.model.swap import swap


@pytest.fixture(scope="module", params=FORMATS)
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("optimum") / request.param, request.param)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """ONNX directories that a test may spoil."""
    return unpacked(tmp_path / "own", "onnx")


def test_the_parts_answer_as_before_they_were_exported(shelf: Path) -> None:
    model = composed(shelf)
    most = 1e-5 if shelf.name == "onnx" else 2e-2  # that OpenVINO directory holds its weights in float16
    assert max(misses(model, shelf, "whisper", "qwen2")) < most
    assert model.provenance["held_against"].count("differs by") == 2 and model.spec.tied


def test_equal_tensors_and_an_untied_head(own: Path) -> None:
    """Tracing stores equal tensors once: there is one zero bias and one norm of ones in whisper-equal."""
    names = {tensor.name for tensor in onnx.load(own / "whisper-equal" / "encoder_model.onnx").graph.initializer}
    assert "layers.1.self_attn_layer_norm.weight" not in names
    model = composed(own, "whisper-equal", "llama")
    assert max(misses(model, own, "whisper-equal", "llama")) < 1e-5 and not model.spec.tied


def test_a_bundle_of_them_passes_the_gate(own: Path, tmp_path: Path) -> None:
    saved = checkpoints.save(composed(own), tmp_path / "checkpoint")
    told: list[dict[str, Any]] = []
    bundle = export_bundle(
        saved, tmp_path / "bundle", precision="fp32", threads=1, gate=GateOptions(), on_gate=told.append
    )
    assert told[0]["passed"] and "held_against" in bundle.manifest.provenance


def test_they_may_be_swapped_in_and_lie_in_a_directory_of_parts(own: Path, tmp_path: Path) -> None:
    model = swap(composed(own, llm="llama"), llm=str(own / "qwen2")).model
    assert misses(model, own, "whisper", "qwen2")[1] < 1e-5 and "model.onnx" in model.provenance["held_against"]
    for part, name in (("encoder", "whisper"), ("llm", "qwen2"), ("codec", "snac")):
        shutil.copytree(own / name, tmp_path / "all" / part)
    assert max(misses(checkpoints.load(tmp_path / "all"), own, "whisper", "qwen2")) < 1e-5


def test_a_model_that_computes_otherwise_is_refused(own: Path) -> None:
    """The shapes fit, and yet it is another model: only running the graph can tell."""
    config = own / "qwen2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 10.0}))
    with pytest.raises(CheckpointError, match=r"model\.onnx: the model that was read from it answers otherwise"):
        composed(own)


@pytest.mark.parametrize("name", ["encoder.layers.1.self_attn.k_proj.weight", "encoder.embed_positions.weight"])
def test_one_tensor_out_of_place_is_seen(own: Path, name: str) -> None:
    model = composed(own)
    with torch.no_grad():
        tensor = dict(model.named_parameters())[name]
        tensor.copy_(tensor.flip(0))
    with pytest.raises(CheckpointError, match=r"encoder_model\.onnx: .* answers otherwise"):
        held_against(model, {"encoder": str(own / "whisper")})


def test_weights_of_torch_come_first(own: Path) -> None:
    (own / "qwen2" / "model.onnx").write_bytes(b"not looked at")
    parts.llm(own / "qwen2")
    model = composed(own)
    assert model.spec.body.width == 64 and "encoder_model.onnx" in model.provenance["held_against"]
    assert " model.onnx" not in model.provenance["held_against"]


def test_external_data_is_read_from_beside_the_graph_alone(own: Path) -> None:
    """Above 2 GB optimum writes the tensors into model.onnx_data."""
    path = own / "qwen2" / "model.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert max(misses(composed(own), own, "whisper", "qwen2")) < 1e-5
    shutil.move(own / "qwen2" / "model.onnx_data", own / "elsewhere")
    with pytest.raises(CheckpointError, match="model.onnx_data"):
        composed(own)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../elsewhere" if entry.key == "location" else entry.value
    onnx.save(model, path)
    with pytest.raises(CheckpointError, match="no file beside it"):
        composed(own)
