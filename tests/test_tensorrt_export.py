"""TensorRT bundles: what their graphs compute on ONNX Runtime against torch, what they hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import parts
import pytest
import torch
from engines_here import matches, random_features, random_ids, truth

from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.schemes import dequantize, parse, quantize, signed_codes
from edgeomni.quantize.tensorrt_kinds import SMALLEST_SCALE
from edgeomni.runtimes.common.embedding_table import RowTable
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.half import rounding
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import HalfMode, SessionFactory

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


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int8w", "int4", "fp8", "nvfp4"])
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8w"])
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
    assert rounding(str(path)).graph != path.read_bytes()


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
    for name, precision in (("encoder", "int8"), ("llm", "int4"), ("llm", "fp8"), ("codec", "fp16")):
        first, again = (written(tiny_model, name, tmp_path / d, precision) for d in "ab")
        assert first.files == again.files and first.meta == again.meta


@pytest.mark.parametrize(
    ("name", "precision"), [("encoder", "int8"), ("llm", "int4"), ("llm", "nvfp4"), ("codec", "fp16")]
)
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
