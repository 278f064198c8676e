"""The exported LLM against transformers and torch: every body type, both flavours, every precision."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from edgeomni.bundle import Component
from edgeomni.components import Features
from edgeomni.errors import BundleError, EngineError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.onnx import schemes_for
from edgeomni.model import bodies
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import dequantize, quantize
from edgeomni.runtimes.common.embedding_table import RowTable
from edgeomni.runtimes.onnxruntime import llm as llm_module
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory

LAYERS, CONTEXT = 2, 96
SIZES: dict[str, Any] = {
    "vocab_size": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4}
BODIES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "qwen2 tied": (Qwen2Config(**SIZES), {}),
    "qwen2 untied": (Qwen2Config(**SIZES), {"tied": False}),
    "qwen2 with TTS adapter": (Qwen2Config(**SIZES), {"tts_layers": 2}),
    "qwen2 untied with TTS adapter": (Qwen2Config(**SIZES), {"tts_layers": 1, "tied": False}),
    "qwen3": (Qwen3Config(**SIZES, head_dim=32), {}),
    "qwen3 with biases": (Qwen3Config(**SIZES, head_dim=16, attention_bias=True), {}),
    "llama, llama3 rope": (LlamaConfig(**SIZES, rope_parameters=LLAMA3), {}),
    "llama, yarn rope": (LlamaConfig(**SIZES, rope_parameters=YARN), {}),
    "llama, linear rope, biases": (
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        ),
        {},
    ),
    "llama, heads of 24": (LlamaConfig(**SIZES, head_dim=24), {}),
    "qwen3, heads of 20": (Qwen3Config(**SIZES, head_dim=20), {}),
}
FLAVOURS = ["ort", "portable"]


def make(name: str, tiny: OmniModel) -> tuple[OmniModel, Any]:
    """A random checkpoint that transformers made, and an OmniModel with the same body: (omni, transformers')."""
    config, extra = BODIES[name]
    torch.manual_seed(len(name))
    theirs = AutoModel.from_config(config).eval()
    spec = replace(tiny.spec, body=bodies.spec_of(config, name), context=CONTEXT, **extra)
    omni = OmniModel(spec, tiny.codec_config).eval()
    with torch.no_grad():
        for part, p in [*omni.named_parameters(), *theirs.named_parameters()]:
            is_gain = "norm" in part and part.endswith("weight")
            p.normal_(float(is_gain), 0.2 if p.dim() == 1 else p.shape[-1] ** -0.5)
    omni.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("embed_tokens")})
    return omni, theirs


@pytest.fixture(scope="module", params=BODIES)
def pair(request: pytest.FixtureRequest, tiny_model: OmniModel) -> tuple[OmniModel, Any]:
    return make(str(request.param), tiny_model)


@pytest.fixture(scope="module")
def omni(tiny_model: OmniModel) -> OmniModel:
    return make("qwen2 tied", tiny_model)[0]


class ExactSessions(SessionFactory):
    """ONNX Runtime fuses DequantizeLinear + MatMul into MatMulNBits; here without rounding the activations."""

    def _options(self) -> Any:
        options = super()._options()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return options


def exported(model: OmniModel, out: Path, precision: str, flavour: str) -> tuple[OrtLanguageModel, Component]:
    component = exporter_of("onnx").export(model, "llm", out, precision, options_of("onnx", {"flavour": flavour}))
    return OrtLanguageModel(out, component, model.spec, ExactSessions(1)), component


def random_ids(model: OmniModel, frames: int, seed: int = 0) -> np.ndarray:
    rng, layout = np.random.default_rng(seed), model.spec.layout
    audio = [rng.integers(0, layout.audio_vocab, frames) + layout.shift(k) for k in range(layout.streams)]
    return np.stack([*audio, rng.integers(0, layout.text_vocab, frames)])[None].astype(np.int32)


def random_features(model: OmniModel, count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, model.spec.body.width)).astype(np.float32)


def torch_logits(model: OmniModel, ids: np.ndarray, features: np.ndarray | None = None) -> list[np.ndarray]:
    """Text [T, text_vocab] and audio [T, K, audio_vocab], all positions at once."""
    given = () if features is None else [(1, torch.from_numpy(features))]
    with torch.no_grad():
        return [part[0].numpy() for part in model(torch.from_numpy(ids).long(), given)]


def walk(llm: OrtLanguageModel, ids: np.ndarray, features: np.ndarray | None, cuts: list[int]) -> list[tuple[Any, ...]]:
    """Prefill up to the first cut, then piece by piece: (position, text logits, audio logits) at the cuts."""
    state, out, start = llm.start(1, ids.shape[-1]), [], 0
    given = [] if features is None else [Features(1, features)]
    for end in cuts:
        hidden = llm.forward(ids[:, :, start:end], given if start == 0 else (), state)
        out.append((end - 1, llm.text_logits(hidden, 0), llm.audio_logits(hidden, 0)))
        start = end
    return out


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_float_export_is_the_torch_model(pair: tuple[OmniModel, Any], flavour: str, tmp_path: Path) -> None:
    model, _ = pair
    llm, _ = exported(model, tmp_path, "fp32", flavour)
    ids, features = random_ids(model, 60), random_features(model, 20)
    text, audio = torch_logits(model, ids, features)
    for at, ours_text, ours_audio in walk(llm, ids, features, [40, 44, *range(45, 61)]):
        np.testing.assert_allclose(ours_text, text[at], atol=1e-4)
        np.testing.assert_allclose(ours_audio, audio[at], atol=1e-4)


def test_text_logits_are_transformers_own(pair: tuple[OmniModel, Any], tmp_path: Path) -> None:
    model, theirs = pair
    llm, _ = exported(model, tmp_path, "fp32", "ort")
    ids = random_ids(model, 50)
    with torch.no_grad():
        embeds = model.embedding(torch.from_numpy(ids).long()).mean(1)
        expected = (theirs(inputs_embeds=embeds).last_hidden_state[0] @ model.text_rows().T).numpy()
    for at, text, _ in walk(llm, ids, None, [30, 49, 50]):
        np.testing.assert_allclose(text, expected[at], atol=1e-4)


def hold_dequantized(model: OmniModel, schemes: dict[str, Any]) -> None:
    for name, p in model.named_parameters():
        if scheme := scheme_of(name, schemes):
            p.data = torch.from_numpy(dequantize(quantize(p.detach().numpy(), scheme)))


def without_rounding(directory: Path) -> None:
    """Turns off the kernels' 8-bit activations (accuracy_level 4), which leaves the stored weights alone to judge."""
    for path in directory.rglob("*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        for attribute in (a for node in graph.graph.node for a in node.attribute if a.name == "accuracy_level"):
            attribute.i = 1
        path.write_bytes(graph.SerializeToString())


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ["qwen2 with TTS adapter", "qwen2 untied", "qwen3", "llama, heads of 24"])
def test_export_computes_with_the_dequantized_weights(
    name: str, flavour: str, precision: str, tiny_model: OmniModel, tmp_path: Path
) -> None:
    model, _ = make(name, tiny_model)
    llm, component = exported(model, tmp_path, precision, flavour)
    ids, features, cuts = random_ids(model, 40), random_features(model, 20), [30, *range(35, 41)]
    rounded = walk(llm, ids, features, cuts)
    without_rounding(tmp_path)
    exact = walk(OrtLanguageModel(tmp_path, component, model.spec, ExactSessions(1)), ids, features, cuts)
    schemes = schemes_for("llm", precision, options_of("onnx", {"flavour": flavour}))
    assert component.scheme.items() <= {group: str(scheme) for group, scheme in schemes.items()}.items()
    hold_dequantized(model, schemes)
    for part, expected in enumerate(torch_logits(model, ids, features), start=1):
        for ours, with_rounding in zip(exact, rounded, strict=True):
            np.testing.assert_allclose(ours[part], expected[ours[0]], atol=1e-4)
            assert np.linalg.norm(ours[part] - with_rounding[part]) < 0.12 * np.linalg.norm(ours[part])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_forked_rows_are_two_single_rows(flavour: str, precision: str, omni: OmniModel, tmp_path: Path) -> None:
    llm, _ = exported(omni, tmp_path, precision, flavour)
    prompt, first, second = random_ids(omni, 24), random_ids(omni, 6, 1), random_ids(omni, 6, 2)
    alone = [walk(llm, np.concatenate([prompt, tail], -1), None, [24, *range(25, 31)])[1:] for tail in (first, second)]
    state = llm.start(2, 40)
    llm.forward(prompt, (), state)
    llm.fork(state)
    for step in range(6):
        if step == 4:
            llm.drop(state, 1)
        rows = [first, second][: 2 if step < 4 else 1]
        hidden = llm.forward(np.concatenate([r[:, :, step : step + 1] for r in rows]), (), state)
        for row in range(len(rows)):
            np.testing.assert_allclose(llm.text_logits(hidden, row), alone[row][step][1], atol=2e-5)
            np.testing.assert_allclose(llm.audio_logits(hidden, row), alone[row][step][2], atol=2e-5)


def test_two_rows_take_several_frames_at_once(omni: OmniModel, tmp_path: Path) -> None:
    llm, _ = exported(omni, tmp_path, "fp32", "ort")
    tails = np.concatenate([random_ids(omni, 5, 1), random_ids(omni, 5, 2)])
    state = llm.start(2, 16)
    llm.forward(random_ids(omni, 8), (), state)
    llm.fork(state)
    hidden = llm.forward(tails, (), state)
    for row in (0, 1):
        whole = np.concatenate([random_ids(omni, 8), tails[row : row + 1]], -1)
        np.testing.assert_allclose(llm.text_logits(hidden, row), torch_logits(omni, whole)[0][-1], atol=1e-4)


def test_a_long_prompt_in_pieces_is_the_prompt(
    omni: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = exported(omni, tmp_path, "fp32", "ort")
    ids, features = random_ids(omni, 50), random_features(omni, 40)
    monkeypatch.setattr(llm_module, "_PREFILL_FRAMES", 16)
    ((_, text, _),) = walk(llm, ids, features, [50])
    np.testing.assert_allclose(text, torch_logits(omni, ids, features)[0][-1], atol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_turns_side_by_side_and_reused_buffers_do_not_meet(flavour: str, omni: OmniModel, tmp_path: Path) -> None:
    llm, _ = exported(omni, tmp_path, "fp32", flavour)
    a, b = random_ids(omni, 20, 1), random_ids(omni, 20, 2)
    one, two = llm.start(1, 20), llm.start(1, 20)
    for t in range(20):
        hidden = [llm.forward(ids[:, :, t : t + 1], (), state) for ids, state in ((a, one), (b, two))]
    used = one.caches
    del one, two
    gc.collect()
    third = llm.start(1, 12)
    assert third.caches is used
    hidden.append(llm.forward(a[:, :, :12], (), third))
    for ids, h in ((a, hidden[0]), (b, hidden[1]), (a[:, :, :12], hidden[2])):
        np.testing.assert_allclose(llm.text_logits(h, 0), torch_logits(omni, ids)[0][-1], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen2 untied", "qwen2 with TTS adapter"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_embedding_rows_are_the_heads_rows(
    name: str, precision: str, flavour: str, tiny_model: OmniModel, tmp_path: Path
) -> None:
    model, _ = make(name, tiny_model)
    _, component = exported(model, tmp_path, precision, flavour)
    rows = model.embedding.weight.detach().numpy()
    scheme = schemes_for("llm", precision, options_of("onnx", {"flavour": flavour}))["embedding"]
    split = model.spec.layout.text_vocab
    for part, expected in (("text", rows[:split]), ("audio", rows[split:])):
        table = component.meta["tables"][part]
        shared = name == "qwen2 tied" or (part == "text" and "untied" not in name)
        assert table["file"] == (f"llm/{part}_head.onnx.data" if shared else f"llm/embedding_{part}.bin")
        ids = np.arange(len(expected))
        stored = dequantize(quantize(expected, scheme))
        np.testing.assert_array_equal(RowTable(tmp_path, table)[ids], stored)
        np.testing.assert_array_equal(RowTable(tmp_path, table)[ids[5:3:-1]], stored[5:3:-1])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_exporting_twice_gives_the_same_bytes(flavour: str, omni: OmniModel, tmp_path: Path) -> None:
    first = exported(omni, tmp_path / "a", "int4", flavour)[1]
    assert exported(omni, tmp_path / "b", "int4", flavour)[1] == first
    written = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert written == {entry.path for entry in first.files}


@pytest.fixture(scope="module")
def llm(omni: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> OrtLanguageModel:
    return exported(omni, tmp_path_factory.mktemp("llm"), "int8", "ort")[0]


def test_a_full_cache_is_refused(llm: OrtLanguageModel, omni: OmniModel) -> None:
    state = llm.start(1, 8)
    llm.forward(random_ids(omni, 8), (), state)
    with pytest.raises(EngineError, match="8 frames"):
        llm.forward(random_ids(omni, 1), (), state)
    with pytest.raises(EngineError, match=str(CONTEXT)):
        llm.start(1, CONTEXT + 1)


def test_rows_that_do_not_exist_are_refused(llm: OrtLanguageModel, omni: OmniModel) -> None:
    state = llm.start(1, 8)
    with pytest.raises(EngineError, match="1 row"):
        llm.forward(np.concatenate([random_ids(omni, 1)] * 2), (), state)
    with pytest.raises(EngineError, match="cannot be forked"):
        llm.fork(state)
    with pytest.raises(EngineError, match="row 0 of 1"):
        llm.drop(state, 0)


def test_ids_and_features_that_do_not_fit_are_refused(llm: OrtLanguageModel, omni: OmniModel) -> None:
    ids = random_ids(omni, 4)
    with pytest.raises(EngineError, match="1 to 5 do not fit 4"):
        llm.forward(ids, [Features(1, random_features(omni, 4))], llm.start(1, 8))
    ids[0, -1, 2] = omni.spec.layout.text_vocab
    with pytest.raises(EngineError, match=f"id {omni.spec.layout.text_vocab} "):
        llm.forward(ids, (), llm.start(1, 8))


def test_the_tts_adapter_speaks_for_row_0_only(tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make("qwen2 with TTS adapter", tiny_model)
    llm, _ = exported(model, tmp_path, "fp32", "ort")
    state = llm.start(2, 8)
    llm.forward(random_ids(model, 3), (), state)
    llm.fork(state)
    hidden = llm.forward(np.concatenate([random_ids(model, 1)] * 2), (), state)
    assert llm.text_logits(hidden, 1).shape == (model.spec.layout.text_vocab,)
    with pytest.raises(EngineError, match="row 1"):
        llm.audio_logits(hidden, 1)


def test_a_table_beyond_its_file_is_refused(omni: OmniModel, tmp_path: Path) -> None:
    _, component = exported(omni, tmp_path, "int8", "ort")
    table = component.meta["tables"]["text"]
    with pytest.raises(BundleError, match="embedding table"):
        RowTable(tmp_path, {**table, "rows": 10**9})
