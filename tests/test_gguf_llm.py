"""The LLM as GGUF: what llama.cpp and ggml compute against torch, what the files hold, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
from engines_here import exported_gguf, matches, random_features, random_ids, truth
from gguf import GGUFReader

from edgeomni import Session, TextDelta, TurnEnd
from edgeomni.bundle import Bundle
from edgeomni.components import Features
from edgeomni.errors import EngineError, UsageError
from edgeomni.export import export_bundle
from edgeomni.exporters import exporter_of, options_of
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel

PRECISIONS = {
    **{"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"},
    **{"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"},
}
"""Precision -> the type of the middle layer's ffn_down, which has 256 inputs in the tiny preset."""
REFUSED = {"qwen3-bias": "llama.cpp's qwen3 has no bias in o"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parts.whisper(tmp_path_factory.mktemp("parts") / "whisper"))


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parts.snac(tmp_path_factory.mktemp("parts") / "codec"))


@pytest.fixture(scope="module")
def bundle(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """q4_0 with the gate on; do not change it."""
    out = tmp_path_factory.mktemp("gguf") / "bundle"
    return export_bundle(tiny_model, out, formats={"llm": "gguf:q4_0", "encoder": "onnx:fp32"}, threads=1)


@pytest.fixture(scope="module")
def speaking(encoder: str, codec: str, tmp_path_factory: pytest.TempPathFactory) -> OmniModel:
    """A model with a TTS adapter of two blocks."""
    directory = tmp_path_factory.mktemp("tts") / "llm"
    return checkpoints.compose(encoder, str(parts.llm(directory, "qwen2")), codec, adapter="linear", tts_layers=2)


def opened(bundle: Bundle, threads: int = 1) -> LlamaLanguageModel:
    return LlamaLanguageModel(bundle.path, bundle.manifest.components["llm"], bundle.spec, threads)


def one(ids: np.ndarray, at: int, rows: int = 1) -> np.ndarray:
    return np.ascontiguousarray(ids[:rows, :, at : at + 1])


# --- values


@pytest.mark.parametrize("kind", parts.LLMS)
def test_every_body_computes_what_torch_does(kind: str, encoder: str, codec: str, tmp_path: Path) -> None:
    model = checkpoints.compose(encoder, str(parts.llm(tmp_path / "llm", kind)), codec, adapter="linear")
    if kind in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[kind]):
            exported_gguf(model, tmp_path / "out")
        return
    llm, ids = exported_gguf(model, tmp_path / "out"), random_ids(model, 70)
    matches(llm, llm.forward(ids, (), llm.start(1, 70)), 0, truth(model, ids))
    llm.close()


def test_a_tts_adapter_speaks_as_torch_does(speaking: OmniModel, tmp_path: Path) -> None:
    """Its blocks see every position of row 0, a prompt's pieces, single frames and an answer's second row included."""
    llm, ids = exported_gguf(speaking, tmp_path / "out"), random_ids(speaking, 75, rows=2)
    ids[1, :, :72] = ids[0, :, :72]
    given = [Features(3, random_features(speaking, 66))]
    expected = [truth(speaking, ids[row : row + 1], given) for row in (0, 1)]
    state = llm.start(2, 75)
    for first, stop in ((0, 70), (70, 72)):
        cut = [Features(3, given[0].values)] if not first else []
        hidden = llm.forward(np.ascontiguousarray(ids[:1, :, first:stop]), cut, state)
        matches(llm, hidden, 0, expected[0], stop - 1)
    llm.fork(state)
    for at in (72, 73):
        hidden = llm.forward(one(ids, at, 2), (), state)
        matches(llm, hidden, 0, expected[0], at)
        np.testing.assert_allclose(llm.text_logits(hidden, 1), expected[1][0][at], atol=1e-4, rtol=1e-4)
        with pytest.raises(EngineError, match="row 1 has no audio logits"):
            llm.audio_logits(hidden, 1)
    llm.drop(state, 1)
    matches(llm, llm.forward(one(ids, 74), (), state), 0, expected[0], 74)
    llm.close()


@pytest.mark.parametrize(("precision", "vnni"), [("q8_0", True), ("q8_0", False), ("q4_0", True)])
def test_two_rows_are_what_turns_of_their_own_give(
    precision: str, vnni: bool, tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q8_0 rows are decoded one by one where the CPU has VNNI, and together elsewhere, as q4_0 rows are."""
    monkeypatch.setattr("edgeomni.runtimes.llamacpp.llm.has_vnni", lambda: vnni)
    llm, ids = exported_gguf(tiny_model, tmp_path, precision), random_ids(tiny_model, 6, rows=2)
    ids[1, :, :3] = ids[0, :, :3]
    alone = [llm.forward(ids[row : row + 1], (), llm.start(1, 6)).text for row in (0, 1)]
    assert llm._together is (precision == "q4_0" or not vnni)
    state = llm.start(2, 6)
    llm.forward(np.ascontiguousarray(ids[:1, :, :3]), (), state)
    llm.fork(state)
    for at in range(3, 6):
        hidden = llm.forward(one(ids, at, 2), (), state)
    # In batches of another shape a value may round to the next of 255 steps.
    np.testing.assert_allclose(hidden.text, np.concatenate(alone), atol=0.05)
    assert not np.allclose(alone[0], alone[1], atol=0.05)
    llm.close()


def test_the_number_of_threads_changes_nothing(bundle: Bundle, tiny_model: OmniModel) -> None:
    llm, ids, found = opened(bundle, threads=2), random_ids(tiny_model, 6, rows=2), []
    for threads in (2, 1):
        llm.set_threads(threads)
        state = llm.start(2, 6)
        llm.forward(np.ascontiguousarray(ids[:1, :, :4]), (), state)
        llm.fork(state)
        hidden = llm.forward(one(ids, 4, 2), (), state)
        llm.drop(state, 1)
        found.append([*hidden.text, llm.text_logits(hidden, 1), llm.forward(one(ids, 5), (), state).text[0]])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(EngineError, match="at least 1, not 0"):
        llm.set_threads(0)
    llm.close()


# --- bundles


@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_k_m"])
def test_precisions_pass_the_gate(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    formats = {"llm": f"gguf:{precision}", "encoder": "onnx:fp32"}
    gate = export_bundle(tiny_model, tmp_path / "out", formats=formats, threads=1).manifest.gate
    assert gate["passed"] is True and gate["fidelity"]["llm.excess"]["verdict"] == "pass"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_stores_its_types(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    llm = exported_gguf(tiny_model, tmp_path, precision)
    body, heads = (GGUFReader(tmp_path / "llm" / f"{name}.gguf").tensors for name in ("body", "heads"))
    types = {t.name: t.tensor_type.name for t in body}
    assert types["blk.1.ffn_down.weight"] == PRECISIONS[precision]
    assert types["blk.1.attn_norm.weight"] == types["blk.1.attn_q.bias"] == "F32"
    assert {t.tensor_type.name for t in heads} == {"Q8_0" if precision.startswith("q") else precision.upper()}
    assert {t.name for t in heads} == {"text_head.weight", "audio_head.weight"}  # tied rows are stored once
    assert np.isfinite(llm.forward(random_ids(tiny_model, 2), (), llm.start(1, 2)).text).all()
    llm.close()


def test_heads_have_a_precision_of_their_own(tiny_model: OmniModel, tmp_path: Path) -> None:
    options, formats = {"gguf": {"heads": "q4_0"}}, {"llm": "gguf:bf16", "encoder": "onnx:fp32"}
    bundle = export_bundle(tiny_model, tmp_path / "out", formats=formats, options=options, threads=1)
    types = {t.tensor_type.name for t in GGUFReader(bundle.path / "llm" / "heads.gguf").tensors}
    assert types == {"Q4_0"} and bundle.manifest.components["llm"].scheme["text_head"] == "q4_0"
    assert "--heads q4_0" in bundle.manifest.provenance["command"]


def test_a_bundle_answers(bundle: Bundle) -> None:
    with Session.open(bundle.path, threads=1) as session:
        events = list(session.respond("tt", text="a b c", max_length=40))
    assert isinstance(events[-1], TurnEnd) and any(isinstance(event, TextDelta) for event in events)
    assert bundle.manifest.components["llm"].engine == "llama.cpp"


def test_an_interrupt_ends_a_call(bundle: Bundle, tiny_model: OmniModel) -> None:
    """The state is of no use then, the model is: the next turn, on the same context, is as ever."""
    llm, ids = opened(bundle), random_ids(tiny_model, 100)
    right = llm.forward(ids, (), llm.start(1, 100)).text
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(Interrupted):
        llm.forward(ids, (), llm.start(1, 100), interrupt)
    np.testing.assert_array_equal(llm.forward(ids, (), llm.start(1, 100), Interrupt()).text, right)
    llm.close()


# --- what is stored


def test_the_files_tell_what_they_are(bundle: Bundle) -> None:
    spec = bundle.spec
    told = {
        name: {k: f.contents() for k, f in GGUFReader(bundle.path / "llm" / f"{name}.gguf").fields.items()}
        for name in ("body", "heads")
    }
    body, heads = told["body"], told["heads"]
    assert body["general.architecture"] == spec.body.kind and heads["general.architecture"] == "edgeomni-heads"
    assert body[f"{spec.body.kind}.attention.head_count_kv"] == spec.body.kv_heads
    assert body["general.file_type"] == 2  # LLAMA_FTYPE_MOSTLY_Q4_0
    assert body["edgeomni.model.id"] == heads["edgeomni.model.id"] and len(body["edgeomni.model.id"]) == 32
    assert heads["edgeomni.layout.text_vocab"] == spec.layout.text_vocab
    for file in (body, heads):
        assert all(file[f"general.{key}"] for key in ("name", "description", "license", "size_label", "tags"))
        assert file["general.quantized_by"].startswith("EdgeOmni ") and file["edgeomni.role"] in told


@pytest.mark.parametrize("role", ["body", "heads"])
def test_one_changed_bit_is_found_by_its_tensor(
    role: str, tiny_model: OmniModel, bundle: Bundle, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    component, path = bundle.manifest.components["llm"], root / "llm" / f"{role}.gguf"
    altered = exporter_of("gguf").altered
    assert altered(tiny_model, component, root) == []
    tensor = GGUFReader(path).tensors[-1]
    raw = bytearray(path.read_bytes())
    raw[int(tensor.data_offset) + 3] ^= 1
    path.write_bytes(raw)
    assert altered(tiny_model, component, root) == [f"{role}:{tensor.name}"]


def test_llama_cpp_s_own_class_loads_the_body(bundle: Bundle) -> None:
    from llama_cpp import Llama

    path = bundle.path / "llm" / "body.gguf"
    body = Llama(str(path), embedding=True, n_ctx=32, verbose=False, n_threads=1)
    assert body.n_embd() == bundle.spec.body.width
    assert body.metadata["general.name"].endswith("LLM body")
    body.close()


# --- what is refused


@pytest.mark.parametrize(
    ("component", "precision", "options", "message"),
    [
        ("llm", "int4", {}, "unknown GGUF precision 'int4'; known are fp32, f16, bf16, q8_0"),
        ("llm", "q4_0", {"heads": "q2_k"}, "heads 'q2_k' are not offered"),
        ("llm", "q4_0", {"head": "q8_0"}, "format gguf has no option head; known are heads, imatrix"),
    ],
)
def test_what_is_not_offered(component: str, precision: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        exporter_of("gguf").schemes_for(component, precision, options_of("gguf", options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 48}, "qwen2 has heads as wide together as the body, not 4 of 48 in 128"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "llama.cpp's qwen2 has no rotary scaling 'llama3'"),
    ],
)
def test_bodies_that_llama_cpp_has_not(
    changes: dict[str, Any], message: str, tiny_model: OmniModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = replace(tiny_model.spec.body, **changes)
    monkeypatch.setattr(tiny_model, "spec", replace(tiny_model.spec, body=body))
    with pytest.raises(UsageError, match=message):
        exported_gguf(tiny_model, tmp_path)
    assert not list((tmp_path / "llm").glob("*.gguf"))


def test_widths_that_blocks_do_not_divide(tiny_model: OmniModel, tmp_path: Path) -> None:
    """tiny's 128 inputs are no whole blocks of 256, so a head cannot be stored in them."""
    with pytest.raises(UsageError, match="text_head has 128 inputs, which q6_k cannot store.* --heads f16"):
        exported_gguf(tiny_model, tmp_path, "q6_k", heads="q6_k")


def test_what_does_not_fit_a_state_is_refused(bundle: Bundle, tiny_model: OmniModel) -> None:
    llm, width = opened(bundle), bundle.spec.body.width
    state = llm.start(1, 4)
    llm.forward(random_ids(tiny_model, 3), (), state)
    with pytest.raises(EngineError, match=r"the cache holds 4 frames; 3 \+ 2 are too many"):
        llm.forward(random_ids(tiny_model, 2), (), state)
    with pytest.raises(EngineError, match="cannot be forked"):
        llm.fork(state)
    with pytest.raises(EngineError, match="ids have 2 row"):
        llm.forward(random_ids(tiny_model, 1, rows=2), (), state)
    with pytest.raises(EngineError, match="do not fit 1 positions"):
        llm.forward(random_ids(tiny_model, 1), [Features(0, np.zeros((1, width + 1), np.float32))], state)
    with pytest.raises(EngineError, match="max_frames 2049"):
        llm.start(1, 2049)
    with pytest.raises(EngineError, match="1 to 64 rows, not 65"):
        llm.start(65, 4)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.forward(random_ids(tiny_model, 1), (), state)
    with pytest.raises(EngineError, match="closed"):
        llm.start(1, 9)


def test_contexts_are_used_again_and_empty(bundle: Bundle, tiny_model: OmniModel) -> None:
    llm, ids = opened(bundle), random_ids(tiny_model, 5)
    state = llm.start(2, 8)
    context = state.caches[0]
    first = llm.forward(ids, (), state).text
    llm.fork(state)
    del state
    state = llm.start(1, 6)
    assert state.caches[0] is context
    np.testing.assert_array_equal(first, llm.forward(ids, (), state).text)
    assert llm.start(1, 6).caches[0] is not context
    llm.close()


def test_a_gpu_that_is_not_there(bundle: Bundle) -> None:
    from edgeomni.runtimes.llamacpp.library import llama

    if llama().llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python has a GPU backend")
    with pytest.raises(EngineError, match="built without a GPU backend; build it with CUDA"):
        LlamaLanguageModel(bundle.path, bundle.manifest.components["llm"], bundle.spec, 1, "cuda")
