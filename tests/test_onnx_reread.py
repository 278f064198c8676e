"""Re-reading an export: one stored byte turned among all the others must be found, and named by its own tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from codec_models import mimi, snac, snac_spec
from test_codec_streams import model_of
from test_onnx_llm import make

from edgeomni.bundle import Component
from edgeomni.exporters import exporter_of, options_of
from edgeomni.model.omni import OmniModel

BOTH = ("ort", "portable")
CASES = [
    (part, name, precision, flavour)
    for part, name, precision, flavours in (
        ("encoder", "tiny", "fp32", ("ort",)),
        ("encoder", "tiny", "fp16", ("portable",)),
        ("encoder", "tiny", "int8", BOTH),
        ("llm", "qwen2 tied", "fp32", ("portable",)),
        ("llm", "qwen2 tied", "fp16", ("ort",)),
        ("llm", "qwen2 tied", "int8", ("portable",)),
        ("llm", "qwen2 tied", "int4", BOTH),
        ("llm", "qwen2 untied with TTS adapter", "int4", BOTH),
        ("llm", "qwen3", "int8", ("ort",)),
        ("codec", "snac", "fp32", ("portable",)),
        ("codec", "mimi", "fp16", ("ort",)),
    )
    for flavour in flavours
]


def model_called(name: str, tiny: OmniModel) -> Any:
    if name == "tiny":
        return tiny
    if name == "snac":
        codec = snac("snac32")
        return model_of(codec, snac_spec(codec))
    return model_of(*mimi()) if name == "mimi" else make(name, tiny)[0]


def exported(model: Any, part: str, out: Path, precision: str, flavour: str = "ort") -> Component:
    options = options_of("onnx", {"flavour": flavour})
    component: Component = exporter_of("onnx").export(model, part, out, precision, options)
    return component


def altered(model: Any, component: Component, root: Path) -> list[str]:
    return list(exporter_of("onnx").altered(model, component, root))


def stored(path: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(path, load_external_data=False).graph.initializer)


@contextmanager
def turned(path: Path, offset: int) -> Iterator[None]:
    """One bit of the file is another within the context."""
    with path.open("r+b") as f:
        f.seek(offset)
        before = f.read(1)
        f.seek(offset)
        f.write(bytes([before[0] ^ 1]))
    try:
        yield
    finally:
        with path.open("r+b") as f:
            f.seek(offset)
            f.write(before)


@contextmanager
def turned_tensor(path: Path, name: str) -> Iterator[None]:
    """One bit of an initializer is another: in the middle of its bytes, wherever these lie."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = {e.key: e.value for e in tensor.external_data}
        with turned(path.with_name(place["location"]), int(place["offset"]) + int(place["length"]) // 2):
            yield
        return
    before, raw = path.read_bytes(), bytearray(tensor.raw_data)
    raw[len(raw) // 2] ^= 1
    tensor.raw_data = bytes(raw)
    path.write_bytes(model.SerializeToString())
    try:
        yield
    finally:
        path.write_bytes(before)


def one_of_each_kind(names: list[str]) -> list[str]:
    """The last of the names that differ in numbers alone: one layer's for all layers'."""
    return list({re.sub(r"\d+", "#", name): name for name in names}.values())


@pytest.mark.parametrize(("part", "name", "precision", "flavour"), CASES)
def test_one_turned_bit_is_found_and_named(
    part: str, name: str, precision: str, flavour: str, tiny_model: OmniModel, tmp_path: Path
) -> None:
    model = model_called(name, tiny_model)
    component = exported(model, part, tmp_path, precision, flavour)
    assert altered(model, component, tmp_path) == []
    for role, graph in component.graphs.items():
        path = tmp_path / graph.path
        for tensor in one_of_each_kind([t.name for t in stored(path)]):
            from_no_weight = tensor.startswith("ints_") and part != "codec"
            expected = [] if from_no_weight else [f"{role}:{tensor}"]  # once, also where a table shares it
            with turned_tensor(path, tensor):
                assert altered(model, component, tmp_path) == expected


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_kinds_of_tensors_that_must_be_among_them(tiny_model: OmniModel, tmp_path: Path, flavour: str) -> None:
    """The test above says something of codes, scales, zero points and packed biases only if they are there."""
    for part, precision, base in (
        ("encoder", "int8", "encoder.layers.0.self_attn.qkv"),
        ("llm", "int4", "body.layers.0.self_attn.qkv"),
    ):
        model = tiny_model if part == "encoder" else make("qwen2 tied", tiny_model)[0]
        component = exported(model, part, tmp_path, precision, flavour)
        names = {t.name for g in component.graphs.values() for t in stored(tmp_path / g.path)}
        expected = {"codes", "scales", "bias"} | ({"zero_points"} if (part, flavour) == ("encoder", "ort") else set())
        assert {n.removeprefix(f"{base}.") for n in names if n.startswith(f"{base}.")} == expected


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("name", ["qwen2 untied", "qwen2 with TTS adapter"])
def test_a_turned_bit_in_a_table_of_its_own_is_found(
    name: str, precision: str, flavour: str, tiny_model: OmniModel, tmp_path: Path
) -> None:
    model, _ = make(name, tiny_model)
    component = exported(model, "llm", tmp_path, precision, flavour)
    own = {p: t for p, t in component.meta["tables"].items() if t["file"].endswith(".bin")}
    assert set(own) == ({"text", "audio"} if name == "qwen2 untied" else {"audio"})
    for part, table in own.items():
        path = tmp_path / table["file"]
        last = path.stat().st_size - 1
        fields = {"codes": table["codes"]["offset"], "scales": last} if precision == "int4" else {"codes": last}
        for field, offset in fields.items():
            with turned(path, offset):
                assert altered(model, component, tmp_path) == [f"embedding_{part}:{field}"]
    assert altered(model, component, tmp_path) == []


def test_a_table_that_points_elsewhere_or_beyond_its_file_is_found(tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make("qwen2 tied", tiny_model)
    component = exported(model, "llm", tmp_path, "int8")
    for part in ("text", "audio"):
        for field in ("codes", "scales"):
            place = component.meta["tables"][part][field]
            for wrong in (place["offset"] + 4, 10**9):
                right, place["offset"] = place["offset"], wrong
                assert altered(model, component, tmp_path) == [f"embedding_{part}:{field}"]
                place["offset"] = right
    assert altered(model, component, tmp_path) == []


CHANGES = {
    "body.layers.1.self_attn.k_proj.weight": ["body:body.layers.1.self_attn.qkv.codes"],
    "body.layers.0.self_attn.v_proj.bias": ["body:body.layers.0.self_attn.qkv.bias"],
    "body.layers.1.mlp.up_proj.weight": ["body:body.layers.1.mlp.gate_up.codes"],
    "body.layers.0.mlp.down_proj.weight": ["body:body.layers.0.mlp.down_proj.codes"],
    "body.layers.0.post_attention_layernorm.weight": ["body:body.layers.0.post_attention_layernorm.weight"],
    "body.norm.weight": ["body:body.norm.weight"],
    "tts.layers.0.self_attn.o_proj.weight": ["tts:tts.layers.0.self_attn.o_proj.codes"],
    "text_head.weight": ["text_head:text_head.codes"],
    "audio_head.weight": ["audio_head:audio_head.codes"],
}


def test_another_checkpoints_tensor_is_named(tiny_model: OmniModel, tmp_path: Path) -> None:
    """One value of one tensor is another's sign: its codes or its bytes differ, and all else stays right."""
    model, _ = make("qwen2 untied with TTS adapter", tiny_model)
    component = exported(model, "llm", tmp_path, "int8")
    parameters = dict(model.named_parameters())
    for name, expected in CHANGES.items():
        values = parameters[name].data.view(-1)
        order = values[:64].abs().argsort()
        at = int(order[len(order) // 2])  # no block's largest value, on which its scale depends
        values[at] = -values[at]
        assert altered(model, component, tmp_path) == expected, name
        values[at] = -values[at]
    for row, part in ((0, "text"), (model.spec.layout.text_vocab, "audio")):
        values = parameters["embedding.weight"].data[row]
        at = int(values.abs().argsort()[32])
        values[at] = -values[at]
        assert altered(model, component, tmp_path) == [f"embedding_{part}:codes"]
        values[at] = -values[at]
    assert altered(model, component, tmp_path) == []


def test_scales_are_told_from_codes(tiny_model: OmniModel, tmp_path: Path) -> None:
    """A row twice as large has the same codes and other scales."""
    model, _ = make("qwen2 tied", tiny_model)
    component = exported(model, "llm", tmp_path, "int4")
    weight = dict(model.named_parameters())["body.layers.0.self_attn.o_proj.weight"].data
    weight[3] *= 2
    assert altered(model, component, tmp_path) == ["body:body.layers.0.self_attn.o_proj.scales"]


def test_a_bias_that_the_model_does_not_have_is_found(tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make("qwen2 tied", tiny_model)
    component = exported(model, "llm", tmp_path, "fp32")
    attention = model.body.layers[0].self_attn
    attention.q_proj.bias = attention.k_proj.bias = attention.v_proj.bias = None
    assert altered(model, component, tmp_path) == ["body:body.layers.0.self_attn.qkv.bias"]


def test_a_constant_that_the_codec_does_not_have_is_found(tmp_path: Path) -> None:
    model = model_called("snac", None)  # type: ignore[arg-type]
    component = exported(model, "codec", tmp_path, "fp32")
    path = tmp_path / component.graphs["codec"].path
    graph = onnx.load(path, load_external_data=False)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "stranger"))
    path.write_bytes(graph.SerializeToString())
    assert altered(model, component, tmp_path) == ["codec:stranger"]


def test_rereading_leaves_the_model_as_it_is(tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make("qwen2 tied", tiny_model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    altered(model, exported(model, "llm", tmp_path, "int4"), tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
