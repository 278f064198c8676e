"""The LLM in OpenVINO against torch: every body type, every precision, and what lies in its files."""

from __future__ import annotations

import gc
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_onnx_llm import BODIES, SIZES, hold_dequantized, make, random_features, random_ids, torch_logits, walk
from transformers import Qwen2Config

if find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from edgeomni.bundle import Bundle, Component, Manifest
from edgeomni.errors import EngineError, UsageError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.openvino import files
from edgeomni.exporters.openvino.graph import Graph
from edgeomni.exporters.openvino.precisions import fitted, schemes_for
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.schemes import Scheme, dequantize, parse, quantize
from edgeomni.runtimes.common.embedding_table import RowTable
from edgeomni.runtimes.openvino.kernel_check import wrong_kernels
from edgeomni.runtimes.openvino.llm import OvLanguageModel
from edgeomni.runtimes.openvino.models import ModelFactory, core

CUTS = [30, *range(35, 41)]


def exported(model: OmniModel, out: Path, precision: str, **options: Any) -> tuple[OvLanguageModel, Component]:
    component = exporter_of("openvino").export(model, "llm", out, precision, options_of("openvino", options))
    return OvLanguageModel(out, component, model.spec, ModelFactory(1)), component


def bundle_of(model: OmniModel, root: Path, component: Component) -> Bundle:
    return Bundle(root, Manifest(model.spec, {component.name: component}, None, {}, {}, {}))


@pytest.fixture(scope="module")
def omni(tiny_model: OmniModel) -> OmniModel:
    return make("qwen2 tied", tiny_model)[0]


@pytest.fixture(scope="module")
def untied(tiny_model: OmniModel) -> OmniModel:
    return make("qwen2 untied with TTS adapter", tiny_model)[0]


@pytest.mark.parametrize("name", BODIES)
def test_a_float_export_is_the_torch_model(name: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make(name, tiny_model)
    llm, _ = exported(model, tmp_path, "fp32")
    ids, features = random_ids(model, 40), random_features(model, 20)
    text, audio = torch_logits(model, ids, features)
    for at, ours_text, ours_audio in walk(llm, ids, features, CUTS):  # type: ignore[arg-type]
        np.testing.assert_allclose(ours_text, text[at], atol=1e-4)
        np.testing.assert_allclose(ours_audio, audio[at], atol=1e-4)


@pytest.mark.parametrize(("count", "heads"), [(1, 4), (2, 4), (3, 12)])
def test_each_key_serves_the_queries_of_its_group(count: int, heads: int) -> None:
    """By itself, because OpenVINO's CPU plugin does it in its own way where attention follows."""
    graph = Graph("group")
    x = graph.input("x", np.float32, [-1, count, -1, 8])
    graph.output("y", graph.repeated(x, count, heads, 8))
    keys = np.random.default_rng(0).standard_normal((2, count, 5, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        core().compile_model(graph.model(), "CPU")([keys])[0], np.repeat(keys, heads // count, axis=1)
    )


@pytest.mark.parametrize("scheme", ["int4_b16", "int8_b32"])
def test_a_weight_that_is_used_twice_is_stored_once(scheme: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    bias, packed, graph = np.ones(32, np.float32), quantize(rows, parse(scheme)), Graph("twice")
    x = graph.input("x", np.float32, [1, 1, 32])
    graph.output("y", graph.linear(graph.linear(x, "w", packed, bias), "w", packed, bias))
    files.save(graph.model(), tmp_path / "twice.xml")
    stored = [constant.name for constant in files.constants(tmp_path / "twice.xml")]
    assert sorted(name for name in stored if name.startswith("w")) == ["w.bias", "w.codes", "w.scales"]
    once, given = dequantize(packed), np.arange(32, dtype=np.float32) / 32
    got = ModelFactory(1).open(tmp_path / "twice.xml").run({"x": given[None, None]})["y"]
    np.testing.assert_allclose(got[0, 0], once @ (once @ given + 1) + 1, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_queries_that_share_keys_all_or_none(
    kv_heads: int, tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bodies above have four query heads and two of keys."""
    monkeypatch.setitem(BODIES, "other", (Qwen2Config(**{**SIZES, "num_key_value_heads": kv_heads}), {}))
    model, _ = make("other", tiny_model)
    llm, _ = exported(model, tmp_path, "fp32")
    ids = random_ids(model, 6)
    text, _ = torch_logits(model, ids)
    hidden = llm.forward(ids, (), llm.start(1, 6))
    np.testing.assert_allclose(llm.text_logits(hidden, 0), text[-1], atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2 with TTS adapter", "qwen2 untied", "qwen3", "llama, heads of 24"])
def test_an_export_computes_with_the_dequantized_weights(
    name: str, precision: str, tiny_model: OmniModel, tmp_path: Path
) -> None:
    model, _ = make(name, tiny_model)
    llm, component = exported(model, tmp_path, precision)
    assert exporter_of("openvino").altered(model, component, tmp_path) == []
    assert wrong_kernels(bundle_of(model, tmp_path, component), component) == (None if precision == "fp16" else 0)
    ids, features = random_ids(model, 40), random_features(model, 20)
    schemes = fitted(schemes_for("llm", precision), model.spec)
    assert component.scheme.items() <= {group: str(scheme) for group, scheme in schemes.items()}.items()
    hold_dequantized(model, schemes)
    for part, expected in enumerate(torch_logits(model, ids, features), start=1):
        for ours in walk(llm, ids, features, CUTS):  # type: ignore[arg-type]
            np.testing.assert_allclose(ours[part], expected[ours[0]], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen2 untied", "qwen2 with TTS adapter"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_embedding_rows_are_the_heads_rows(name: str, precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make(name, tiny_model)
    _, component = exported(model, tmp_path, precision)
    own = {"qwen2 tied": [], "qwen2 untied": ["embedding"], "qwen2 with TTS adapter": ["embedding", "tts.linear"]}
    assert component.scheme.keys() == {"body.linear", "text_head", "audio_head", *own[name]}, "what is stored, no more"
    rows = model.embedding.weight.detach().numpy()
    split = model.spec.layout.text_vocab
    for part, expected in (("text", rows[:split]), ("audio", rows[split:])):
        table = component.meta["tables"][part]
        shared = name == "qwen2 tied" or (part == "text" and "untied" not in name)
        assert table["file"] == (f"llm/{part}_head.bin" if shared else f"llm/embedding_{part}.bin")
        stored = dequantize(quantize(expected, parse(table["scheme"])))
        np.testing.assert_array_equal(RowTable(tmp_path, table)[np.arange(len(expected))], stored)


@pytest.mark.parametrize("which", ["omni", "untied"])
def test_every_altered_tensor_is_named(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One bit of each weight, bias, norm, scale and embedding row is turned, one file after the other."""
    model: OmniModel = request.getfixturevalue(which)
    _, component = exported(model, tmp_path / "good", "int4")
    parameters = sum(p.dim() == 2 and name.startswith(("body", "tts")) for name, p in model.named_parameters())
    turned, kinds = 0, set[tuple[str, str]]()
    for role, graph in component.graphs.items():
        for stored in files.constants(tmp_path / "good" / graph.path):
            if not stored.name.startswith(("body", "tts", "text_head", "audio_head", "rope")):
                continue
            turned += 1
            kind = role, re.sub(r"\d+", "", stored.name)
            if kind in kinds:  # one of each kind, of whichever layer comes first
                continue
            kinds.add(kind)
            root = shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
            flip((root / graph.path).with_suffix(".bin"), stored.offset + stored.size // 2)
            named = exporter_of("openvino").altered(model, component, root)
            assert f"{role}:{stored.name}" in named
    assert turned > parameters and {"rope.cos", "rope.sin"} <= {name for _, name in kinds}
    for part, table in component.meta["tables"].items():
        if "embedding" in table["file"]:
            root = shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
            flip(root / table["file"], table["codes"]["offset"] + 3)
            assert exporter_of("openvino").altered(model, component, root) == [f"embedding_{part}:codes"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_exporting_twice_gives_the_same_bytes(omni: OmniModel, tmp_path: Path) -> None:
    first = exported(omni, tmp_path / "a", "int4")[1]
    assert exported(omni, tmp_path / "b", "int4")[1] == first
    written = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert written == {entry.path for entry in first.files}


def test_weights_that_openvino_turns_into_floats_are_counted(omni: OmniModel, tmp_path: Path) -> None:
    """Float files under an integer scheme: none of the layers runs on the kernel that the manifest promises."""
    _, component = exported(omni, tmp_path, "fp32")
    component.scheme["body.linear"] = "int4_b32"
    layers = 4 * omni.spec.body.layers + 2
    assert wrong_kernels(bundle_of(omni, tmp_path, component), component) == layers + 1


def test_blocks_divide_every_width(omni: OmniModel, tmp_path: Path) -> None:
    _, component = exported(omni, tmp_path / "a", "int4")  # widths 64 and 96
    assert (component.scheme["body.linear"], component.scheme["text_head"]) == ("int4_b32", "int8_b64")
    _, component = exported(omni, tmp_path / "b", "int4", block=16)
    assert component.scheme["body.linear"] == "int4_b16"
    with pytest.raises(UsageError, match="block 48 is not offered"):
        options_of("openvino", {"block": 48})


def test_widths_that_no_block_divides_are_refused(tiny_model: OmniModel) -> None:
    model, _ = make("qwen3, heads of 20", tiny_model)
    assert fitted({"body.linear": Scheme("int4", 128)}, model.spec)["body.linear"] == Scheme("int4", 16)
    odd = make("qwen2 tied", tiny_model)[0].spec
    object.__setattr__(odd.body, "ffn", 100)
    with pytest.raises(UsageError, match="64 and 100 inputs.*export it as fp16"):
        fitted(schemes_for("llm", "int4"), odd)


@pytest.mark.parametrize(
    ("component", "precision", "match"),
    [
        ("llm", "q4_0", "unknown OpenVINO precision"),
        ("codec", "int8", "codec fp32 or fp16"),
        ("encoder", "int4", "encoder int8"),
        ("head", "fp32", "unknown component"),
    ],
)
def test_precisions_that_are_not_offered(component: str, precision: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        schemes_for(component, precision)


def test_the_requests_of_a_turn_serve_a_later_one(omni: OmniModel, tmp_path: Path) -> None:
    """Which begins empty; four are kept at most, and none once the model is closed."""
    llm, _ = exported(omni, tmp_path, "fp32")
    ids = random_ids(omni, 6)
    state = llm.start(2, 6)
    expected = llm.text_logits(llm.forward(ids, (), state), 0)
    llm.fork(state)
    blocks = state.caches
    del state
    gc.collect()
    again = llm.start(2, 6)
    assert again.caches is blocks
    np.testing.assert_array_equal(llm.text_logits(llm.forward(ids, (), again), 0), expected)
    several = [llm.start(2, 6) for _ in range(5)]
    assert len({id(state.caches) for state in (again, *several)}) == 6
    del again, several
    gc.collect()
    assert len(llm._spare) == 4
    llm.close()
    assert not llm._spare
    with pytest.raises(EngineError, match=str(omni.spec.context)):
        llm.start(1, omni.spec.context + 1)


def test_damaged_files_are_named(omni: OmniModel, tmp_path: Path) -> None:
    _, component = exported(omni, tmp_path, "int8")
    body = tmp_path / component.graphs["body"].path
    whole, weights = body.read_bytes(), body.with_suffix(".bin").read_bytes()
    for spoilt in (b"", b"<net>", whole[: len(whole) // 2], b"\0" * 1000, whole.replace(b"MatMul", b"MatMup")):
        body.write_bytes(spoilt)
        with pytest.raises(EngineError, match="body.xml cannot be loaded.*edgeomni verify"):
            ModelFactory(1).open(body)
    body.write_bytes(whole)
    for spoilt in (b"", weights[: len(weights) // 2]):
        body.with_suffix(".bin").write_bytes(spoilt)
        with pytest.raises(EngineError, match="body.xml cannot be loaded"):
            ModelFactory(1).open(body)
    body.with_suffix(".bin").unlink()
    with pytest.raises(EngineError, match="body.bin is missing"):
        ModelFactory(1).open(body)
