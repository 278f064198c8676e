"""The precisions of TensorRT bundles: what they round, how ranges are measured, what ONNX Runtime makes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import parts
import pytest
import torch
from engines_here import random_ids
from test_tensorrt_export import CACHE, written

from edgeomni.audio import log_mel
from edgeomni.bundle import Bundle, Component, write_manifest
from edgeomni.components import OpenOptions
from edgeomni.errors import EngineUnavailable, UsageError
from edgeomni.exporters import exporter_of
from edgeomni.exporters.onnx.graph import BFLOAT16, FLOAT, FLOAT16, Graph
from edgeomni.exporters.tensorrt.input_ranges import _scale, input_scales
from edgeomni.exporters.tensorrt.operators import OPSET, TensorRtOperators
from edgeomni.exporters.tensorrt.precisions import schemes_for
from edgeomni.manifest import Manifest
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.policy import component_precisions
from edgeomni.quantize.schemes import Scheme, dequantize, parse, quantize
from edgeomni.quantize.tensorrt_kinds import half_scale
from edgeomni.recorded import Recorded
from edgeomni.runtimes import onnxruntime
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.half import widened
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import HalfMode, SessionFactory
from edgeomni.tensorrt_builder import Recipe, build_engine, installed

trt = exporter_of("tensorrt")


def mel_of(model: OmniModel, frames: int) -> Any:
    rng = np.random.default_rng(0)
    return rng.standard_normal((model.spec.front_end.n_mels, frames)).astype(np.float32)


def encoder_of(model: OmniModel, component: Component, out: Path, mode: HalfMode) -> OrtEncoder:
    graph = out / component.graphs["encoder"].path
    own: dict[str, Any] = {"foreign": [graph] if component.precision == "bf16" else []}
    own["folded"] = [graph] if "input_scales" in component.meta else []
    return OrtEncoder(out, component, model.spec, SessionFactory(1, half=mode, **own))


# --- values


@pytest.mark.parametrize("kind", ["int8_static", "fp8_static", "fp8_b32", "nvfp4", "bf16"])
def test_a_product_rounds_as_its_types_say(kind: str, tmp_path: Path) -> None:
    """One linear layer in the rounding mode against arithmetic that ml_dtypes rounds, up to the result's last bit."""
    rng, scale = np.random.default_rng(0), float(np.float16(3 / (448 if kind == "fp8_static" else 127)))
    weight, bias = (0.1 * rng.standard_normal(s).astype(np.float32) for s in ((24, 64), 24))
    x = rng.standard_normal((1, 5, 64)).astype(np.float32)
    compute = BFLOAT16 if kind == "bf16" else FLOAT16
    narrow = ml_dtypes.bfloat16 if kind == "bf16" else np.float16
    operators = TensorRtOperators(Graph("g", OPSET), compute=compute, inputs={"layer": scale})
    packed = quantize(weight, parse(kind))
    y = operators.linear(operators.graph.input("x", FLOAT, [1, 5, 64]), "layer", packed, bias)
    operators.graph.output("y", FLOAT, [1, 5, 24], y)
    path = operators.graph.save(tmp_path / "g.onnx")[0]
    inputs = x.astype(narrow).astype(np.float64)
    if kind == "int8_static":
        inputs = np.clip(np.round(x.astype(np.float16) / np.float32(scale)), -128, 127).astype(np.float64) * scale
    if kind == "fp8_static":
        codes = np.clip(inputs / scale, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        inputs = codes.astype(np.float64) * scale
    held = dequantize(packed).astype(np.float64)
    product = inputs @ (held if kind.endswith("_static") else held.astype(narrow).astype(np.float64)).T
    for mode, expected in (
        ("rounding", product.astype(narrow).astype(np.float64)),
        ("widened", x @ dequantize(packed).T),
    ):
        factory = SessionFactory(1, half=mode, foreign=[path], folded=[path])  # type: ignore[arg-type]
        found = factory.open(path).run(None, {"x": x})[0]
        ulp = (2.0**-7 if kind == "bf16" else 2.0**-10) if mode == "rounding" else 1e-5
        np.testing.assert_allclose(found - bias, expected, rtol=1.01 * ulp, atol=2e-6)


@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
def test_the_encoder_holds_what_torch_stores(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    """Exact but for convolutions in the narrow type in the exact mode; rounded, it is as far away as torch is."""
    component = written(tiny_model, "encoder", tmp_path, precision)
    mel = mel_of(tiny_model, 2 * tiny_model.spec.encoder.context)
    found = {mode: encoder_of(tiny_model, component, tmp_path, mode).encode(mel) for mode in ("rounding", "widened")}
    torch_gives = {}
    for mode, exact in (("rounding", False), ("widened", True)):
        with trt.as_exported(tiny_model, component, exact=exact), torch.no_grad():
            torch_gives[mode] = tiny_model.encode(torch.from_numpy(mel)[None])[0].numpy()
    size = float(np.abs(torch_gives["widened"]).mean())
    apart = float(np.abs(torch_gives["rounding"] - torch_gives["widened"]).mean())
    assert np.abs(found["widened"] - torch_gives["widened"]).mean() < (4e-3 if precision == "bf16" else 5e-4) * size
    assert 0.5 * apart < np.abs(found["rounding"] - torch_gives["widened"]).mean() < 1.5 * apart


@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4", "bf16"])
def test_a_bundle_runs_where_tensorrt_cannot(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    """ONNX Runtime opens the LLM as a user's session does, and answers near to the checkpoint."""
    component = written(tiny_model, "llm", tmp_path, precision, cache=CACHE)
    llm = onnxruntime.open_component(bundle_of(tiny_model, component, tmp_path), "llm", OpenOptions(threads=1))
    assert isinstance(llm, OrtLanguageModel)
    ids, given = random_ids(tiny_model, 20), {}
    for exact in (True, False):
        with trt.as_exported(tiny_model, component, exact=exact), torch.no_grad():
            given[exact] = tiny_model(torch.from_numpy(ids))[0][0, -1].numpy()
    logits = llm.text_logits(llm.forward(ids, (), llm.start(1, 20)), 0)
    error, apart = (float(np.square(a - given[True]).mean() ** 0.5) for a in (logits, given[False]))
    assert error < max(1.5 * apart, 0.02 * float(given[True].std())) < 0.5 * float(given[True].std())


def bundle_of(model: OmniModel, component: Component, root: Path) -> Bundle:
    kept = {"llm": component}
    kept["encoder"] = written(model, "encoder", root, "fp16")
    kept["codec"] = written(model, "codec", root, "fp16")
    write_manifest(root, Manifest(model.spec, kept, None, {"weights": "random"}, {}, gate={}))
    return Bundle.open(root, hashes=False)


def test_without_onnx_foreign_types_are_refused_by_name(
    tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = written(tiny_model, "encoder", tmp_path, "bf16")
    monkeypatch.delitem(sys.modules, "edgeomni.runtimes.onnxruntime.half", raising=False)
    monkeypatch.delattr(onnxruntime, "half", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EngineUnavailable, match=r"encoder.onnx holds bfloat16 or FP4.*pip install.*fp16, int8 or int4"):
        encoder_of(tiny_model, component, tmp_path, "free")


# --- what the graphs hold


def test_nvfp4_is_widened_to_integers_of_twice_its_value(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "llm", tmp_path, "nvfp4", cache=CACHE)
    graph, constants = widened(str(tmp_path / component.graphs["body"].path))
    kinds = {t.name: t.data_type for t in onnx.load_from_string(graph).graph.initializer}
    name = "body.layers.0.mlp.down_proj"
    assert kinds[f"{name}.codes"] == onnx.TensorProto.INT8 and kinds[f"{name}.scales"] == onnx.TensorProto.FLOAT
    weight = tiny_model.body.layers[0].mlp.down_proj.weight.detach().numpy()
    held = constants[f"{name}.codes"].astype(np.float32) * constants[f"{name}.scales"].repeat(16, 0)
    np.testing.assert_array_equal(held.T, dequantize(quantize(weight, Scheme("nvfp4"))))


def test_int8_leaves_the_inputs_of_down_proj(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "llm", tmp_path, "int8", cache=CACHE)
    layers = tiny_model.spec.body.layers
    scales = component.meta["input_scales"]
    assert len(scales) == 6 * layers and not any("down_proj" in name for name in scales)
    assert component.scheme["body.linear"] == "int8_static"
    assert component.scheme[f"body.layers.{layers - 1}.mlp.down_proj.weight"] == "int8_f16_b128"
    nodes = onnx.load(tmp_path / component.graphs["body"].path, load_external_data=False).graph.node
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 3 * layers  # qkv, o_proj, gate_up


def test_a_tts_adapter_is_calibrated_too(tmp_path: Path) -> None:
    dirs = [
        str(parts.whisper(tmp_path / "w")),
        str(parts.llm(tmp_path / "l", "qwen2")),
        str(parts.snac(tmp_path / "s")),
    ]
    model = checkpoints.compose(*dirs, adapter="linear", tts_layers=1)
    component = written(model, "llm", tmp_path / "out", "int8", cache=CACHE)
    assert "tts.layers.0.self_attn.o_proj" in component.meta["input_scales"]
    assert component.scheme["tts.layers.0.mlp.down_proj.weight"].startswith("int8_f16")
    assert trt.altered(model, component, tmp_path / "out") == []


def test_a_scale_that_was_altered_is_named(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "encoder", tmp_path, "int8")
    scales = component.meta["input_scales"]
    assert trt.altered(tiny_model, component, tmp_path) == []
    name = "encoder.layers.0.fc1"
    scales[name] = float(half_scale(scales[name] * 2))
    assert trt.altered(tiny_model, component, tmp_path) == [f"encoder:{name}.input_scale"]


def test_bf16_keeps_heads_in_half(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, "llm", tmp_path, "bf16", cache=CACHE)
    assert component.scheme["body.linear"] == "bf16" and component.scheme["text_head"] == "fp16"
    assert component.meta["kv"] == "bfloat16" and component.meta["tables"]["text"]["codes"]["dtype"] == "float16"
    ports = {port.name: port.dtype for port in component.graphs["body"].inputs}
    assert ports["past_key.0"] == "bfloat16" and ports["inputs_embeds"] == "float"


# --- calibration


@contextmanager
def heard(model: OmniModel, sounds: list[Any], turns: list[torch.Tensor] | None = None) -> Iterator[None]:
    """Within the context `model` has recorded these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "recorded", Recorded(sounds, turns or []))
        yield


def peaks(model: OmniModel, part: str, computing: Callable[[], Any]) -> dict[str, float]:
    """Linear layer below `part` -> the largest input while `computing` runs, by hooks of torch's own."""
    seen: dict[str, float] = {}

    def note(name: str) -> Any:
        return lambda _, args: seen.update({name: max(seen.get(name, 0.0), float(args[0].abs().max()))})

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(part)}
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        computing()
    for handle in handles:
        handle.remove()
    return seen


def test_scales_cover_what_was_heard(tiny_model: OmniModel) -> None:
    """The largest input becomes FP8's largest but for room; INT8 may cut some of it."""
    spec, full = tiny_model.spec.front_end, 2 * tiny_model.spec.encoder.context
    sound = (0.1 * np.random.default_rng(0).standard_normal(spec.sample_rate)).astype(np.float32)
    windows = [log_mel(sound[: t * spec.hop], spec, t) for t in (full, max(2, full // 8 * 2))]
    seen = peaks(tiny_model, "encoder", lambda: [tiny_model.encode(torch.from_numpy(mel)[None]) for mel in windows])
    with heard(tiny_model, [sound]):
        fp8 = input_scales(tiny_model, "encoder", schemes_for("encoder", "fp8"))
        int8 = input_scales(tiny_model, "encoder", schemes_for("encoder", "int8"))
    for name, peak in seen.items():
        assert fp8[name] == pytest.approx(2 * peak / 448, rel=2e-3)
        assert 0.2 * peak / 127 * 0.99 <= int8[name] <= peak / 127 * 1.01
    assert set(int8) == set(fp8) > set(seen)  # the adapter's as well
    assert int8 != input_scales(tiny_model, "encoder", schemes_for("encoder", "int8")), "made-up sounds are others"


def test_scales_of_the_llm_are_those_of_recorded_turns(tiny_model: OmniModel) -> None:
    width, schemes = tiny_model.spec.body.width, schemes_for("llm", "int8")
    turns = [3 * torch.randn(n, width, generator=torch.Generator().manual_seed(n)) for n in (5, 9)]
    seen = peaks(tiny_model, "body", lambda: [tiny_model.hidden(turn[None]) for turn in turns])
    with heard(tiny_model, [], turns):
        scales = input_scales(tiny_model, "llm", schemes)
    body = {name: scale for name, scale in scales.items() if name.startswith("body")}
    assert body and set(body) <= set(seen)
    for name, scale in body.items():
        assert 0.2 * seen[name] / 127 * 0.99 <= scale <= seen[name] / 127 * 1.01


def test_of_many_sounds_some_are_heard_and_none_is_too_long(tiny_model: OmniModel) -> None:
    """Every third of 24 sounds, evenly over all; what does not fit the window is cut."""
    spec, encoder = tiny_model.spec.front_end, tiny_model.spec.encoder
    loud, silent = (level * np.ones(3 * encoder.context * spec.hop, np.float32) for level in (0.5, 0.0))
    schemes = schemes_for("encoder", "fp8")
    with heard(tiny_model, [silent] * 24):
        quiet = input_scales(tiny_model, "encoder", schemes)
    with heard(tiny_model, [loud if i % 3 else silent for i in range(24)]):
        assert input_scales(tiny_model, "encoder", schemes) == quiet
    with heard(tiny_model, [loud if i == 21 else silent for i in range(24)]):
        assert input_scales(tiny_model, "encoder", schemes) != quiet


def test_a_few_large_inputs_are_cut_where_that_errs_less(tiny_model: OmniModel) -> None:
    rng = np.random.default_rng(0)
    plain = np.abs(rng.standard_normal(5000)).astype(np.float32)
    even = [np.append(np.float32(1), rng.random(5000).astype(np.float32))]
    assert _scale(even, "int8_static") == pytest.approx(1 / 127, rel=0.03)
    rare = [np.append(np.float32(12), [*plain, 12.0]).astype(np.float32)]
    chosen = _scale(rare, "int8_static")
    errors = {
        s: np.square(np.minimum(np.rint(rare[0][1:] / s), 127) * s - rare[0][1:]).mean() for s in (chosen, 12 / 127)
    }
    assert chosen < 12 / 127 and errors[chosen] < errors[12 / 127]
    assert _scale([np.zeros(4, np.float32)], "int8_static") > 0


# --- choices


@pytest.mark.parametrize(
    ("precision", "encoder", "codec"),
    [("int8w", "int8w", "fp16"), ("nvfp4", "fp8", "fp16"), ("bf16", "bf16", "fp16"), ("int4", "int8", "fp16")],
)
def test_each_component_gets_what_it_stands(precision: str, encoder: str, codec: str) -> None:
    assert component_precisions(precision, "tensorrt") == {"encoder": encoder, "llm": precision, "codec": codec}


def test_the_encoder_is_not_offered_in_four_bits() -> None:
    for precision, instead in (("int4", "int8"), ("nvfp4", "fp8")):
        with pytest.raises(UsageError, match=f"encoder:{precision} is not offered.*use encoder {instead}"):
            schemes_for("encoder", precision)
    with pytest.raises(UsageError, match="codec:bf16 is not offered"):
        schemes_for("codec", "bf16")


# --- the builder


@pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize(
    ("component", "precision", "target"),
    [
        ("encoder", "int8", "sm_75"),
        ("encoder", "fp8", "sm_89"),
        ("llm", "int8", "sm_86"),
        ("llm", "fp8", "sm_89"),
        ("llm", "nvfp4", "sm_120"),
        ("llm", "bf16", "sm_80"),
    ],
)
def test_tensorrt_builds_it(component: str, precision: str, target: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    """For the oldest GPU that it is offered for."""
    made = written(tiny_model, component, tmp_path, precision, cache=64)
    role = "body" if component == "llm" else component
    recipe = Recipe(**made.meta["recipes"][role])
    build_engine(tmp_path / made.graphs[role].path, tmp_path / "engine", recipe, [target])
    assert (tmp_path / "engine").stat().st_size > 100_000


def test_an_encoder_is_built_for_windows_from_one_feature_on(tiny_model: OmniModel, tmp_path: Path) -> None:
    spec = tiny_model.spec
    profile = written(tiny_model, "encoder", tmp_path, "int8w").meta["recipes"]["encoder"]["profiles"][0]["mel"]
    assert profile == [[1, spec.front_end.n_mels, t] for t in (2, 2 * spec.encoder.context, 2 * spec.encoder.context)]
