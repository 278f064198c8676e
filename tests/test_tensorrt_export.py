"""TensorRT bundles: what their graphs compute on ONNX Runtime against torch, what they hold, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import parts
import pytest
import torch
from engines_here import matches, random_features, random_ids, truth

from edgeomni import Session
from edgeomni.bundle import Bundle, Component
from edgeomni.components import Features
from edgeomni.engines import COMPONENTS
from edgeomni.errors import BundleError, EngineError, ExportError, UsageError
from edgeomni.export import choices, export_bundle
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.tensorrt.precisions import block_for
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.schemes import Scheme, dequantize, parse, quantize, signed_codes
from edgeomni.quantize.tensorrt_kinds import SMALLEST_SCALE
from edgeomni.runtimes.common.embedding_table import RowTable
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.half import rounding
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import HalfMode, SessionFactory
from edgeomni.tensorrt_builder import installed

FORMATS = dict.fromkeys(COMPONENTS, "tensorrt")
CACHE = 256
trt = exporter_of("tensorrt")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parts.whisper(tmp_path_factory.mktemp("parts") / "whisper"))


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parts.snac(tmp_path_factory.mktemp("parts") / "codec"))


def written(model: OmniModel, name: str, out: Path, precision: str = "fp32", **options: Any) -> Component:
    component: Component = trt.export(model, name, out, precision, options_of("tensorrt", options))
    component.meta = json.loads(json.dumps(component.meta))
    return component


def opened(model: OmniModel, out: Path, precision: str, mode: HalfMode = "widened") -> OrtLanguageModel:
    component = written(model, "llm", out, precision, cache=CACHE)
    return OrtLanguageModel(out, component, model.spec, SessionFactory(1, half=mode))


def one(ids: np.ndarray, at: int, rows: int = 1) -> np.ndarray:
    return np.ascontiguousarray(ids[:rows, :, at : at + 1])


# --- values


@pytest.mark.parametrize("kind", parts.LLMS)
def test_every_body_computes_what_torch_does(kind: str, encoder: str, codec: str, tmp_path: Path) -> None:
    model = checkpoints.compose(encoder, str(parts.llm(tmp_path / "llm", kind)), codec, adapter="linear")
    llm, ids = opened(model, tmp_path / "out", "fp32"), random_ids(model, 70)
    expected, state = truth(model, ids), llm.start(1, 70)
    matches(llm, llm.forward(np.ascontiguousarray(ids[:, :, :69]), (), state), 0, expected, 68)
    matches(llm, llm.forward(one(ids, 69), (), state), 0, expected, 69)


def test_a_tts_adapter_speaks_as_torch_does(encoder: str, codec: str, tmp_path: Path) -> None:
    """Its blocks see every position of row 0, a prompt's pieces, single frames and an answer's second row included."""
    llm_dir = str(parts.llm(tmp_path / "llm", "qwen2"))
    model = checkpoints.compose(encoder, llm_dir, codec, adapter="linear", tts_layers=2)
    llm, ids = opened(model, tmp_path / "out", "fp32"), random_ids(model, 75, rows=2)
    ids[1, :, :72] = ids[0, :, :72]
    given = [Features(3, random_features(model, 66))]
    expected = [truth(model, ids[row : row + 1], given) for row in (0, 1)]
    state = llm.start(2, 75)
    for first, stop in ((0, 70), (70, 72)):
        cut = given if not first else []
        hidden = llm.forward(np.ascontiguousarray(ids[:1, :, first:stop]), cut, state)
        matches(llm, hidden, 0, expected[0], stop - 1)
    llm.fork(state)
    for at in (72, 73):
        hidden = llm.forward(one(ids, at, 2), (), state)
        matches(llm, hidden, 0, expected[0], at)
        np.testing.assert_allclose(llm.text_logits(hidden, 1), expected[1][0][at], atol=1e-4, rtol=1e-4)
    llm.drop(state, 1)
    matches(llm, llm.forward(one(ids, 74), (), state), 0, expected[0], 74)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_the_graphs_hold_the_weights_of_their_precision(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    """Widened to float32, they compute what torch computes with the weights as quantized."""
    component = written(tiny_model, "llm", tmp_path, precision, cache=CACHE)
    llm = OrtLanguageModel(tmp_path, component, tiny_model.spec, SessionFactory(1, half="widened"))
    ids = random_ids(tiny_model, 20)
    with trt.as_exported(tiny_model, component, exact=True):
        expected = truth(tiny_model, ids)
    matches(llm, llm.forward(ids, (), llm.start(1, 20)), 0, expected)
    original = truth(tiny_model, ids)[0][-1]
    assert not np.allclose(llm.text_logits(llm.forward(ids, (), llm.start(1, 20)), 0), original, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_encoder_hears_what_torch_hears(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "encoder", tmp_path, precision)
    rng, spec = np.random.default_rng(0), tiny_model.spec
    stored = 1e-4 if precision == "fp32" else 1e-3  # convolutions are stored in half, which torch does not imitate
    for mode, exact, tolerance in (("widened", True, stored), ("rounding", False, 2e-2)):
        encoder = OrtEncoder(tmp_path, component, spec, SessionFactory(1, half=mode))  # type: ignore[arg-type]
        for frames in (2, 60, 2 * spec.encoder.context):
            mel = rng.standard_normal((spec.front_end.n_mels, frames)).astype(np.float32)
            with trt.as_exported(tiny_model, component, exact=exact), torch.no_grad():
                expected = tiny_model.encode(torch.from_numpy(mel)[None])[0].numpy()
            assert np.abs(encoder.encode(mel) - expected).max() < tolerance * np.abs(expected).max()


def test_rounding_rounds_where_onnx_runtime_would_not(tmp_path: Path) -> None:
    """A product in half between casts: rounded inputs and a rounded result, to the bit."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((64, 8)).astype(np.float16), rng.standard_normal((3, 64)).astype(np.float32)
    make, port = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [make("Cast", ["x"], ["h"], to=10), make("MatMul", ["h", "w"], ["p"]), make("Cast", ["p"], ["y"], to=1)]
    stored = [onnx.numpy_helper.from_array(weight, "w")]
    graph = onnx.helper.make_graph(nodes, "g", [port("x", 1, [3, 64])], [port("y", 1, [3, 8])], stored)
    path = tmp_path / "g.onnx"
    opsets = [onnx.helper.make_opsetid("", 21)]
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    halved = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float64)
    found = {mode: SessionFactory(1, half=mode).open(path).run(None, {"x": x})[0] for mode in ("rounding", "widened")}
    np.testing.assert_array_equal(found["rounding"], found["rounding"].astype(np.float16))
    np.testing.assert_allclose(found["rounding"], halved, rtol=1e-3)
    np.testing.assert_allclose(found["widened"], x @ weight.astype(np.float32), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(found["widened"], found["widened"].astype(np.float16))
    assert rounding(str(path)) != path.read_bytes()


def test_a_cache_of_fewer_frames_holds_only_these(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "llm", tmp_path, "fp16", cache=40)
    assert (component.meta["context"], component.meta["prefill"], component.meta["kv"]) == (40, 40, "float16")
    ports = {port.name: port.shape for port in component.graphs["body"].inputs}
    assert ports["past_key.0"] == ["B", tiny_model.spec.body.kv_heads, 40, tiny_model.spec.body.head_dim]
    llm = OrtLanguageModel(tmp_path, component, tiny_model.spec, SessionFactory(1, half="free"))
    llm.start(2, 40)
    with pytest.raises(EngineError, match="holds 1 to 40 frames"):
        llm.start(1, 41)


# --- what is stored


@pytest.mark.parametrize("kind", ["int4_f16", "int8_f16"])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_integers_have_scales_that_half_holds(kind: str, block: int) -> None:
    """Positive, symmetric, and each weight within half a step of its own scale."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((9, 256)) * rng.choice([1e-7, 1e-2, 1, 100], (9, 1))).astype(np.float32)
    weight[0] = 0
    scheme = parse(f"{kind}_b{block}")
    packed = quantize(weight, scheme)
    assert packed.scales is not None and packed.scales.min() >= SMALLEST_SCALE
    np.testing.assert_array_equal(packed.scales, packed.scales.astype(np.float16))
    codes, most = signed_codes(packed).astype(int), 2 ** (int(scheme.bits) - 1) - 1
    assert -most <= codes.min() and codes.max() <= most
    scales = packed.scales.repeat(block, 1)
    np.testing.assert_allclose(dequantize(packed), codes * scales, rtol=1e-6)
    # a scale rounded down may leave the largest weight up to one half's rounding beyond the last code
    assert (np.abs(dequantize(packed) - weight) <= scales * (0.5 + most * 2.0**-11)).all()
    assert str(scheme) == f"{kind}_b{block}"


def test_embedding_rows_are_read_with_scales_in_half(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "llm", tmp_path, "int4")
    table = component.meta["tables"]["audio"]
    assert table["scales"]["dtype"] == "float16" and table["file"].endswith("audio_head.onnx.data")
    rows = tiny_model.audio_rows().detach().numpy()
    expected = dequantize(quantize(rows, parse(table["scheme"])))
    ids = np.array([0, 5, len(rows) - 1, 5])
    np.testing.assert_array_equal(RowTable(tmp_path, table)[ids], expected[ids])


def test_exporting_twice_gives_the_same_graphs(tiny_model: OmniModel, tmp_path: Path) -> None:
    for name, precision in (("encoder", "int8"), ("llm", "int4"), ("codec", "fp16")):
        first, again = (written(tiny_model, name, tmp_path / d, precision) for d in "ab")
        assert first.files == again.files and first.meta == again.meta


@pytest.mark.parametrize(("name", "precision"), [("encoder", "int8"), ("llm", "int4"), ("codec", "fp16")])
def test_altered_tensors_are_named(name: str, precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, name, tmp_path, precision, cache=64)
    assert trt.altered(tiny_model, component, tmp_path) == []
    graph = tmp_path / component.graphs["body" if name == "llm" else name].path
    stored = onnx.load(graph, load_external_data=False).graph.initializer
    tensor = next(t for t in stored if t.data_location == onnx.TensorProto.EXTERNAL and "weight" in t.name + "weight")
    place = {e.key: e.value for e in tensor.external_data}
    data = bytearray(graph.with_name(place["location"]).read_bytes())
    data[int(place["offset"]) + 1] ^= 64
    graph.with_name(place["location"]).write_bytes(data)
    assert trt.altered(tiny_model, component, tmp_path) == [f"{'body' if name == 'llm' else name}:{tensor.name}"]


def test_altered_embedding_rows_are_named(encoder: str, codec: str, tmp_path: Path) -> None:
    llm_dir = str(parts.llm(tmp_path / "llm", "qwen2-untied"))
    model = checkpoints.compose(encoder, llm_dir, codec, adapter="linear")
    component = written(model, "llm", tmp_path, "fp16")
    place = component.meta["tables"]["text"]
    path = tmp_path / place["file"]
    assert path.name == "embedding_text.bin" and trt.altered(model, component, tmp_path) == []
    data = bytearray(path.read_bytes())
    data[place["codes"]["offset"] + 1] ^= 64
    path.write_bytes(data)
    assert trt.altered(model, component, tmp_path) == ["embedding_text:codes"]


# --- bundles


@pytest.fixture(scope="module")
def bundle(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int4 with the gate on and an engine for sm_89, sm_120 where TensorRT-RTX is installed; do not change it."""
    target = "sm_87,sm_89,sm_120" if "tensorrt_rtx" in installed() else "sm_87"
    own = {"tensorrt": {"target": target, "cache": CACHE}}
    return export_bundle(
        tiny_model, tmp_path_factory.mktemp("trt") / "b", precision="int4", formats=FORMATS, options=own, threads=1
    )


def test_the_gate_judges_the_graphs(bundle: Bundle) -> None:
    """With half rounded as a GPU rounds, and the exact mode in float32, which leaves nothing but float32's rounding."""
    gate = bundle.manifest.gate
    assert gate["passed"] is True
    assert gate["fidelity"]["llm.error"]["value"] < 1e-5
    assert 0 < gate["fidelity"]["llm.excess"]["value"] < 2
    assert 45 < gate["fidelity"]["codec.si_sdr"]["value"] < 80  # were it not rounded, it would be over 100
    assert set(gate["engines"]) == {"onnxruntime"}


def test_the_manifest_says_what_was_built_and_how_to_build_it(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path, hashes=True)
    llm = again.manifest.components["llm"]
    assert (llm.format, llm.engine, again.manifest.components["codec"].precision) == ("tensorrt", "tensorrt", "fp16")
    roles = {"body", "text_head", "audio_head"}
    assert set(llm.graphs) == set(llm.meta["recipes"]) == roles
    prefill, decode = llm.meta["recipes"]["body"]["profiles"]
    width = again.spec.body.width
    assert prefill["inputs_embeds"] == [[1, 1, width], [1, 128, width], [1, CACHE, width]]
    assert decode["position_ids"] == [[1, 1], [2, 1], [2, 1]]
    assert set(decode) >= {
        port.name for port in llm.graphs["body"].inputs if any(isinstance(d, str) for d in port.shape)
    }
    built = {engine["role"]: engine for engine in llm.meta["engines"]}
    if "tensorrt_rtx" in installed():
        assert set(built) == roles and built["body"]["path"] == "llm/body.sm_89-sm_120.engine"
        assert built["body"]["targets"] == ["sm_89", "sm_120"] and built["body"]["package"] == "tensorrt_rtx"
        assert again.file(built["body"]["path"]).stat().st_size > 100_000
    else:
        assert not built
    assert "--target sm_87" in again.manifest.provenance["command"]


def test_the_bundle_speaks_on_onnx_runtime(bundle: Bundle) -> None:
    """What a machine without TensorRT does with it."""
    end = list(Session.open(bundle.path).respond("ta", text="w1 w2 w3", max_length=30))[-1]
    assert np.asarray(end.tokens).shape[1] > 5


@pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt-rtx is not installed")
def test_a_truncated_engine_is_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    engine = copy / "llm" / "body.sm_89-sm_120.engine"
    engine.write_bytes(engine.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"llm/body\.sm_89-sm_120\.engine has \d+ bytes instead of"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["engines"].append(dict.fromkeys(("role", "path", "version"), "../x")), "engines"),
        (lambda meta: meta["recipes"]["body"]["profiles"][0].update(x=[[1], [1]]), "profiles"),
        (lambda meta: meta.update(context=0), "context"),
        (lambda meta: meta.update(kv="float64"), "kv"),
    ],
)
def test_a_manifest_with_another_meta_is_refused(change: Any, message: str, bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    data = json.loads((copy / "bundle.json").read_bytes())
    change(data["components"]["llm"]["meta"])
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_a_target_that_is_not_built_here_is_said(
    tiny_model: OmniModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "edgeomni"):
        component = written(tiny_model, "encoder", tmp_path, "fp16", target="sm_87,sm_90")
    assert "sm_87 (Jetson Orin), sm_90 (H100, H200)" in caplog.text and "first run there builds" in caplog.text
    assert component.meta["engines"] == [] and component.meta["targets"] == ["sm_87", "sm_90"]


def test_a_failed_build_leaves_no_bundle(
    tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeomni.tensorrt_builder.installed", lambda: ())
    own = {"tensorrt": {"target": "sm_89", "cache": 64}}
    with pytest.raises(ExportError, match=r"tensorrt-rtx, which is not installed: pip install"):
        export_bundle(tiny_model, tmp_path / "b", precision="fp16", formats=FORMATS, options=own)
    assert not list(tmp_path.iterdir())


# --- what is refused


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int4", {"target": "sm_75"}, "sm_75 .* does not compute int4"),
        ("int4", {"target": "sm_99"}, "unknown target 'sm_99'; known are sm_75"),
        ("int4", {"block": 48}, "block 48 is not offered"),
        ("int4", {"cache": 8}, "cache of 8 frames is not offered"),
        ("fp8", {}, "fp8 is not offered for TensorRT yet"),
        ("nvfp4", {"target": "sm_89"}, "nvfp4 is not offered"),
        ("q8_0", {}, "unknown TensorRT precision 'q8_0'"),
    ],
)
def test_requests_that_make_no_sense_are_refused(precision: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choices(precision, FORMATS, {"tensorrt": options})


def test_the_precision_of_each_component_is_chosen() -> None:
    assert choices("int4", FORMATS) == {
        "encoder": ("tensorrt", "int8"),
        "llm": ("tensorrt", "int4"),
        "codec": ("tensorrt", "fp16"),
    }
    assert choices("fp32", FORMATS)["codec"] == ("tensorrt", "fp32")
    for component, precision in (("codec", "int8"), ("encoder", "int4")):
        with pytest.raises(UsageError, match=f"{component}:{precision} is not offered"):
            choices("fp16", {component: f"tensorrt:{precision}"})


def test_a_block_must_divide_the_widths(tiny_model: OmniModel) -> None:
    spec, options = tiny_model.spec, options_of("tensorrt", {})
    assert block_for("llm", spec, options) == 128  # widths 128 and 256
    assert block_for("llm", spec, options_of("tensorrt", {"block": 32})) == 32
    narrow = replace(spec, body=replace(spec.body, ffn=192))
    with pytest.raises(UsageError, match="block 128 does not divide all of the widths 128, 192; use block 64"):
        block_for("llm", narrow, options_of("tensorrt", {"block": 128}))
    odd = replace(spec, body=replace(spec.body, ffn=100))
    with pytest.raises(UsageError, match="no block that TensorRT takes divides all of the widths 100, 128; use fp16"):
        block_for("llm", odd, options)
    assert Scheme("int4_f16", 64) == parse("int4_f16_b64")
