"""Quantized bodies are, byte for byte, what llama.cpp's own `llama_model_quantize` makes of the float32 file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType

from edgeomni.exporters import exporter_of
from edgeomni.exporters.gguf import precisions
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.llamacpp.library import llama

FILE_TYPES = {
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}


@pytest.fixture(scope="module")
def nano() -> OmniModel:
    """Five layers; 256 divides the body's width, and not the 640 inputs of ffn_down."""
    return checkpoints.preset("nano", 0)


@pytest.fixture(scope="module")
def floats(nano: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("floats")
    exporter_of("gguf").export(nano, "llm", out, "fp32")
    return out / "llm" / "body.gguf"


@pytest.mark.parametrize("precision", FILE_TYPES)
def test_what_llama_cpp_writes(precision: str, nano: OmniModel, floats: Path, tmp_path: Path) -> None:
    exporter_of("gguf").export(nano, "llm", tmp_path, precision)
    theirs = tmp_path / "theirs.gguf"
    params = llama().llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(FILE_TYPES[precision])
    assert llama().llama_model_quantize(os.fsencode(floats), os.fsencode(theirs), params) == 0
    expected = {t.name: t for t in GGUFReader(theirs).tensors}
    found = {t.name: t for t in GGUFReader(tmp_path / "llm" / "body.gguf").tensors}
    assert set(found) == set(expected)
    for name in set(found) - {"token_embd.weight"}:  # rows of zeros, which are never read
        assert found[name].tensor_type == expected[name].tensor_type, name
        np.testing.assert_array_equal(np.asarray(found[name].data), np.asarray(expected[name].data), err_msg=name)
    types = {t.tensor_type.name for t in found.values() if t.name.endswith("ffn_down.weight")}
    assert types == {"q4_k_m": {"Q5_0", "Q8_0"}, "q5_k_m": {"Q5_1", "Q8_0"}, "q6_k": {"Q8_0"}}.get(
        precision, {precision.upper()}
    )


@pytest.mark.parametrize("layers", [1, 3, 8, 24])
def test_mixtures_choose_layers_as_llama_cpp_does(layers: int) -> None:
    """Written once more from its rule: the first and the last eighth, and every third of those between."""
    names = [f"body.layers.{i}.mlp.down_proj.weight" for i in range(layers)]
    eighth = layers // 8
    more = {
        name
        for i, name in enumerate(names)
        if i in range(eighth) or i in range(7 * layers // 8, layers) or i in range(eighth + 2, layers, 3)
    }
    schemes = precisions.mixture("q4_k_m", dict.fromkeys(names, 256), layers, "body.linear")
    kinds = {name: schemes.get(name, schemes["body.linear"]).kind for name in names}
    assert {name for name, kind in kinds.items() if kind == "q6_k"} == more
    assert set(kinds.values()) <= {"q6_k", "q4_k"}
