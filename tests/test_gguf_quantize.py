"""Quantized bodies are, byte for byte, what llama.cpp's own `llama_model_quantize` makes of the float32 file."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType

from edgeomni.errors import UsageError
from edgeomni.export import export_bundle
from edgeomni.exporters import exporter_of, options_of
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


def imatrix_file(path: Path, body: Path) -> dict[str, np.ndarray]:
    """An importance matrix of the older layout for every linear layer of a body; returns its entries."""
    rng, entries = np.random.default_rng(6), {}
    for tensor in GGUFReader(body).tensors:
        if tensor.name.endswith("weight") and len(tensor.shape) == 2 and tensor.name != "token_embd.weight":
            entries[tensor.name] = np.exp(2 * rng.standard_normal(int(tensor.shape[0]))).astype(np.float32)
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values)) + values.tobytes()
    path.write_bytes(raw)
    return entries


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m"])
def test_an_importance_matrix_does_what_it_does_in_llama_cpp(
    precision: str, nano: OmniModel, floats: Path, tmp_path: Path
) -> None:
    entries = imatrix_file(tmp_path / "imatrix.dat", floats)
    options = options_of("gguf", {"imatrix": str(tmp_path / "imatrix.dat")})
    exporter_of("gguf").export(nano, "llm", tmp_path, precision, options)
    data = (llama().llama_model_imatrix_data * (len(entries) + 1))()
    for i, (name, values) in enumerate(entries.items()):
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        data[i].name, data[i].data, data[i].size = name.encode(), pointer, len(values)
    params = llama().llama_model_quantize_default_params()
    params.nthread, params.ftype, params.imatrix = 1, int(FILE_TYPES[precision]), data
    assert llama().llama_model_quantize(os.fsencode(floats), os.fsencode(tmp_path / "theirs.gguf"), params) == 0
    expected = {t.name: t for t in GGUFReader(tmp_path / "theirs.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "llm" / "body.gguf").tensors:
        if tensor.name != "token_embd.weight":
            np.testing.assert_array_equal(np.asarray(tensor.data), np.asarray(expected[tensor.name].data), tensor.name)


def test_an_export_by_an_importance_matrix_is_judged_by_it(nano: OmniModel, floats: Path, tmp_path: Path) -> None:
    """The bundle holds the matrix, so that what is stored can be worked out again; the gate's torch holds the same."""
    imatrix_file(tmp_path / "imatrix.dat", floats)
    options = {"gguf": {"imatrix": str(tmp_path / "imatrix.dat")}}
    formats = {"llm": "gguf:q4_0", "encoder": "onnx:fp32"}
    bundle = export_bundle(nano, tmp_path / "out", formats=formats, options=options, threads=1)
    assert bundle.manifest.components["llm"].meta["imatrix"] == "llm/imatrix"
    assert bundle.manifest.gate["fidelity"]["llm.error"]["value"] < 1e-3
    assert bundle.manifest.provenance["command"].endswith("--imatrix FILE")


def test_the_importance_matrix_of_another_model(tiny_model: OmniModel, floats: Path, tmp_path: Path) -> None:
    imatrix_file(tmp_path / "imatrix.dat", floats)
    options = options_of("gguf", {"imatrix": str(tmp_path / "imatrix.dat")})
    with pytest.raises(UsageError, match=r"has \[256\] entries for blk.0.attn_q.weight, not 128: it was made with ano"):
        exporter_of("gguf").export(tiny_model, "llm", tmp_path, "q4_0", options)
