"""The LLM as GGUF: what llama.cpp and ggml compute against torch, what is stored, and files that are not as they should."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
from engines_here import exported_gguf, matches, random_ids, truth
from gguf import GGUFReader

from edgeomni import load
from edgeomni.bundle import Bundle
from edgeomni.components import Components
from edgeomni.errors import BundleError, EngineError, UsageError
from edgeomni.export import export_bundle
from edgeomni.exporters import exporter_of, options_of
from edgeomni.gate.judge import GateOptions
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel

PRECISIONS = ("fp32", "f16", "bf16", "q8_0", "q5_0", "q4_0")
REFUSED = {"llama3-rope": "rotary scaling 'llama3'", "llama-yarn": "rotary scaling 'yarn'"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parts.whisper(tmp_path_factory.mktemp("parts") / "whisper"))


@pytest.fixture(scope="module")
def bundle(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """q4_0 with the gate on; do not change it."""
    out = tmp_path_factory.mktemp("gguf") / "bundle"
    return export_bundle(tiny_model, out, formats={"llm": "gguf:q4_0"}, threads=1)


def opened(bundle: Bundle) -> LlamaLanguageModel:
    return LlamaLanguageModel(bundle.path, bundle.manifest.components["llm"], bundle.spec, 1)


# --- values


@pytest.mark.parametrize("kind", parts.LLMS)
def test_every_body_computes_what_torch_does(kind: str, encoder: str, tmp_path: Path) -> None:
    model = checkpoints.compose(
        encoder, str(parts.llm(tmp_path / "llm", kind)), str(parts.snac(tmp_path / "codec")), adapter="linear"
    )
    if kind in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[kind]):
            exported_gguf(model, tmp_path / "out")
        return
    llm, ids = exported_gguf(model, tmp_path / "out"), random_ids(model, 40)
    matches(llm, llm.forward(ids, (), llm.start(1, 40)), 0, truth(model, ids))
    llm.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_passes_the_gate(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    bundle = export_bundle(tiny_model, tmp_path / "out", formats={"llm": f"gguf:{precision}"}, threads=1)
    assert bundle.manifest.gate["passed"] is True
    heads = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out" / "llm" / "heads.gguf").tensors}
    quantized = precision.startswith("q")
    assert set(heads.values()) == {"Q8_0" if quantized else {"fp32": "F32"}.get(precision, precision.upper())}


def test_heads_have_a_precision_of_their_own(tiny_model: OmniModel, tmp_path: Path) -> None:
    options = {"gguf": {"heads": "q4_0"}}
    bundle = export_bundle(tiny_model, tmp_path / "out", formats={"llm": "gguf:bf16"}, options=options, threads=1)
    types = {t.tensor_type.name for t in GGUFReader(bundle.path / "llm" / "heads.gguf").tensors}
    assert types == {"Q4_0"}
    assert bundle.manifest.components["llm"].scheme["text_head"] == "q4_0"


def test_two_rows_in_one_call_or_two_are_the_same(tiny_model: OmniModel, tmp_path: Path) -> None:
    """q8_0 rows are decoded one by one, q4_0 rows together; each must be what a turn of its own gives."""
    for precision in ("q8_0", "q4_0"):
        llm = exported_gguf(tiny_model, tmp_path / precision, precision)
        ids = random_ids(tiny_model, 6, rows=2)
        ids[1, :, :3] = ids[0, :, :3]
        alone = [llm.forward(np.ascontiguousarray(ids[row : row + 1]), (), llm.start(1, 6)) for row in (0, 1)]
        state = llm.start(2, 6)
        llm.forward(np.ascontiguousarray(ids[:1, :, :3]), (), state)
        llm.fork(state)
        for at in range(3, 6):
            hidden = llm.forward(np.ascontiguousarray(ids[:, :, at : at + 1]), (), state)
        # In other shapes of batches a value may round to the next of 255 steps.
        np.testing.assert_allclose(hidden, np.concatenate(alone), atol=0.05)


def test_a_bundle_answers_and_no_torch_or_onnx_is_in_the_llm(bundle: Bundle) -> None:
    session = load(bundle.path, threads=1)
    events = list(session.respond("tt", text="a b c", seed=0)) if hasattr(session, "respond") else []
    assert events
    session.close()
    assert bundle.manifest.components["llm"].engine == "llama.cpp"


# --- what is stored


def test_the_files_tell_what_they_are(bundle: Bundle) -> None:
    body, heads = (GGUFReader(bundle.path / "llm" / f"{name}.gguf") for name in ("body", "heads"))
    spec = bundle.spec
    told = {key: field.contents() for key, field in body.fields.items()}
    assert told["general.architecture"] == spec.body.kind
    assert told[f"{spec.body.kind}.block_count"] == spec.body.layers
    assert told[f"{spec.body.kind}.attention.head_count_kv"] == spec.body.kv_heads
    assert told["tokenizer.ggml.model"] == "none" and "random weights" in told["general.license"]
    assert heads.fields["edgeomni.layout.text_vocab"].contents() == spec.layout.text_vocab


@pytest.mark.parametrize("role", ["body", "heads"])
def test_one_changed_byte_is_found_by_its_tensor(
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


def test_a_tts_adapter_is_refused(tmp_path: Path, encoder: str) -> None:
    model = checkpoints.compose(
        encoder,
        str(parts.llm(tmp_path / "llm", "qwen2")),
        str(parts.snac(tmp_path / "codec")),
        adapter="linear",
        tts_layers=1,
    )
    with pytest.raises(UsageError, match="a TTS adapter is not written as GGUF"):
        exported_gguf(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("component", "precision", "options", "message"),
    [
        ("encoder", "f16", {}, "encoder:gguf is not offered; write the encoder as onnx"),
        ("llm", "int4", {}, "unknown GGUF precision 'int4'; known are fp32, f16, bf16, q8_0, q5_0, q4_0"),
        ("llm", "q4_0", {"heads": "q2_k"}, "heads 'q2_k' are not offered"),
        ("llm", "q4_0", {"head": "q8_0"}, "format gguf has no option head; known are heads"),
    ],
)
def test_what_is_not_offered(component: str, precision: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        exporter_of("gguf").schemes_for(component, precision, options_of("gguf", options))


# --- files that are not as they should be


def broken(bundle: Bundle, to: Path, role: str, change: Any) -> Bundle:
    root = Path(shutil.copytree(bundle.path, to))
    path = root / "llm" / f"{role}.gguf"
    path.write_bytes(change(path.read_bytes()))
    return Bundle(root, bundle.manifest)


def renamed(old: bytes, new: bytes) -> Any:
    assert len(old) == len(new)
    return lambda raw: raw.replace(old, new, 1)


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("body", lambda raw: raw[: len(raw) // 2], "lies beyond the end of the file|no GGUF file"),
        ("body", lambda raw: b"", "is no GGUF file that can be read"),
        ("body", lambda raw: b"FUGG" + raw[4:], "is no GGUF file that can be read"),
        ("body", renamed(b"qwen2", b"llama"), "is of the architecture 'llama', not qwen2"),
        ("body", renamed(b"blk.1.attn_q.weight", b"blk.7.attn_q.weight"), "lacks the tensor blk.1.attn_q.weight"),
        ("heads", renamed(b"text_head.weight", b"test_head.weight"), "lacks the tensor text_head.weight"),
        ("heads", lambda raw: raw[:-64], "lies beyond the end of the file|no GGUF file"),
    ],
)
def test_bad_files_are_refused_before_any_c_code(
    role: str, change: Any, message: str, bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        opened(broken(bundle, tmp_path / "copy", role, change))


def test_the_heads_of_another_model(bundle: Bundle, tmp_path: Path) -> None:
    from dataclasses import replace

    layout = replace(bundle.spec.layout, text_vocab=bundle.spec.layout.text_vocab + 32)
    other = replace(bundle.spec, layout=layout)
    with pytest.raises(BundleError, match=r"text_head.weight is Q8_0 of \[512, 128\], not .* of \[544, 128\]"):
        LlamaLanguageModel(bundle.path, bundle.manifest.components["llm"], other, 1)


FUZZ = """
import random, sys
from pathlib import Path
from edgeomni.bundle import Bundle
from edgeomni.errors import EdgeOmniError
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel
bundle = Bundle.open(sys.argv[1], hashes=False)
rng, refused = random.Random(int(sys.argv[2])), 0
for role in ("body", "heads"):
    path = bundle.path / "llm" / f"{role}.gguf"
    good = path.read_bytes()
    for _ in range(int(sys.argv[3])):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 4, 32])):
            raw[rng.randrange(rng.choice([64, 4096, len(raw)]))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            LlamaLanguageModel(bundle.path, bundle.manifest.components["llm"], bundle.spec, 1).close()
        except EdgeOmniError:
            refused += 1
    path.write_bytes(good)
print("refused", refused)
"""


def test_no_changed_bytes_end_the_process(bundle: Bundle, tmp_path: Path) -> None:
    """In a child process, which ggml would end: every file is opened, or refused by our own error."""
    root = shutil.copytree(bundle.path, tmp_path / "copy")
    done = subprocess.run([sys.executable, "-c", FUZZ, str(root), "0", "40"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 30


# --- limits


def test_what_does_not_fit_a_state_is_refused(bundle: Bundle, tiny_model: OmniModel) -> None:
    llm = opened(bundle)
    state = llm.start(1, 4)
    llm.forward(random_ids(tiny_model, 3), (), state)
    with pytest.raises(EngineError, match=r"the cache holds 4 frames; 3 \+ 2 are too many"):
        llm.forward(random_ids(tiny_model, 2), (), state)
    with pytest.raises(EngineError, match="cannot be forked"):
        llm.fork(state)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.forward(random_ids(tiny_model, 1), (), state)


def test_contexts_are_used_again_and_empty(bundle: Bundle, tiny_model: OmniModel) -> None:
    llm, ids = opened(bundle), random_ids(tiny_model, 5)
    first = llm.forward(ids, (), llm.start(1, 8))
    again = llm.forward(ids, (), llm.start(1, 8))
    np.testing.assert_array_equal(first, again)
    llm.close()


def test_components_are_what_the_bundle_says(bundle: Bundle) -> None:
    from edgeomni.runtimes import open_components

    components = open_components(bundle)
    assert isinstance(components, Components) and isinstance(components.llm, LlamaLanguageModel)
    components.close()


_ = struct
