"""GGUF files that are not as they should be: our own error, before any C code could end the process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines_here import random_ids
from gguf import GGUFReader

from edgeomni.bundle import Component, GraphEntry, Manifest
from edgeomni.errors import BundleError, EngineError
from edgeomni.exporters import exporter_of
from edgeomni.gguf_llm import body_facts, layout_facts
from edgeomni.model import checkpoints
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.llamacpp import library
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel

Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def root(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the LLM of the tiny preset, q4_0; do not change it."""
    out = tmp_path_factory.mktemp("gguf")
    component = exporter_of("gguf").export(tiny_model, "llm", out, "q4_0")
    manifest = Manifest(tiny_model.spec, {"llm": component}, None, {}, {}, {})
    (out / "llm.json").write_text(json.dumps(manifest.to_dict()))
    return out


@pytest.fixture
def component(tiny_model: OmniModel, root: Path) -> Component:
    return Component(**{**json.loads((root / "llm.json").read_text())["components"]["llm"], "graphs": graphs_of(root)})


def graphs_of(root: Path) -> dict[str, Any]:
    return {role: GraphEntry(f"llm/{role}.gguf") for role in ("body", "heads")}


def copied(root: Path, to: Path, role: str, change: Change) -> Path:
    path = Path(shutil.copytree(root, to)) / "llm" / f"{role}.gguf"
    path.write_bytes(change(path.read_bytes()))
    return to


def renamed(old: bytes, new: bytes) -> Change:
    assert len(old) == len(new)
    return lambda raw: raw.replace(old, new)


def number(key: bytes, value: int) -> Change:
    """Another uint32 behind a key and its type."""

    def change(raw: bytes) -> bytes:
        at = raw.index(key) + len(key) + 4
        return raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :]

    return change


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("body", lambda raw: raw[: len(raw) // 2], "no GGUF file|beyond the end"),
        ("body", lambda raw: b"", "is no GGUF file that can be read"),
        ("body", lambda raw: b"FUGG" + raw[4:], "is no GGUF file that can be read"),
        ("heads", lambda raw: raw[:-64], "no GGUF file|beyond the end"),
        ("body", renamed(b"qwen2", b"llama"), "is of the architecture 'llama', not qwen2"),
        ("body", renamed(b"blk.1.attn_q.weight", b"blk.7.attn_q.weight"), "lacks the tensor blk.1.attn_q.weight"),
        ("heads", renamed(b"text_head.weight", b"test_head.weight"), "lacks the tensor text_head.weight"),
        ("body", number(b"qwen2.block_count", 4), "qwen2.block_count is '4'.*, not 3"),
        ("body", number(b"qwen2.attention.key_length", 16), "attention.key_length is '16'.*, not 32"),
        ("body", number(b"qwen2.rope.freq_base", 0), r"rope.freq_base is '0.0'.*, not 1000000.0"),
        ("body", renamed(b"qwen2.vocab_size", b"qwen2.vocab_sizf"), "qwen2.vocab_size is 'None' .missing., not 32"),
        ("heads", number(b"edgeomni.layout.text_vocab", 9), "layout.text_vocab is '9'.*, not 512"),
        (
            "body",
            renamed(b"general.size_label", b"qwen2.expert_count"),
            "'qwen2.expert_count', which no such model has",
        ),
    ],
)
def test_bad_files_are_refused_by_name(
    role: str, change: Change, message: str, root: Path, component: Component, tiny_model: OmniModel, tmp_path: Path
) -> None:
    path = copied(root, tmp_path / "copy", role, change)
    with pytest.raises(BundleError, match=message):
        LlamaLanguageModel(path, component, tiny_model.spec, 1)


def test_files_that_are_missing(root: Path, component: Component, tiny_model: OmniModel, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy" / "llm" / "heads.gguf").unlink()
    with pytest.raises(BundleError, match="heads.gguf: no such file"):
        LlamaLanguageModel(tmp_path / "copy", component, tiny_model.spec, 1)


def test_a_body_and_heads_of_different_models(
    root: Path, component: Component, tiny_model: OmniModel, tmp_path: Path
) -> None:
    """Same shapes, other weights: only the id that both files hold tells."""
    exporter_of("gguf").export(checkpoints.preset("tiny", 1), "llm", tmp_path / "other", "q4_0")
    shutil.copytree(root, tmp_path / "copy")
    shutil.copy(tmp_path / "other" / "llm" / "heads.gguf", tmp_path / "copy" / "llm" / "heads.gguf")
    with pytest.raises(BundleError, match="belong to different models"):
        LlamaLanguageModel(tmp_path / "copy", component, tiny_model.spec, 1)


def test_the_heads_of_another_layout(root: Path, component: Component, tiny_model: OmniModel) -> None:
    layout = replace(tiny_model.spec.layout, text_vocab=tiny_model.spec.layout.text_vocab + 32)
    with pytest.raises(BundleError, match="layout.text_vocab is '512'|text_head.weight is Q8_0 of"):
        LlamaLanguageModel(root, component, replace(tiny_model.spec, layout=layout), 1)


def test_every_fact_of_the_spec_is_in_the_file(root: Path, tiny_model: OmniModel) -> None:
    fields = GGUFReader(root / "llm" / "body.gguf").fields
    wanted = {**body_facts(tiny_model.spec, 3), **layout_facts(tiny_model.spec)}
    assert {key: pytest.approx(value) for key, value in wanted.items()} == {
        key: fields[key].contents() for key in wanted
    }


def test_a_library_with_other_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read through a wrong declaration is no longer what llama.cpp's defaults are."""
    llama_cpp = library.llama()
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = 7
    monkeypatch.setattr(llama_cpp, "llama_context_default_params", lambda: params)
    with pytest.raises(EngineError, match=r"do not fit together \(\['n_seq_max'\]\): is LLAMA_CPP_LIB_PATH set"):
        library._check_structures(llama_cpp)


FUZZ = """
import json, random, sys
from pathlib import Path
from edgeomni.bundle import Component, GraphEntry
from edgeomni.errors import EdgeOmniError
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel
from edgeomni.spec import OmniSpec
import numpy as np
root, seeds = Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3]))
told = json.loads((root / "llm.json").read_text())
spec = OmniSpec.from_dict(told["spec"])
graphs = {role: GraphEntry(f"llm/{role}.gguf") for role in ("body", "heads")}
component = Component(**{**told["components"]["llm"], "graphs": graphs})
good = {role: (root / "llm" / f"{role}.gguf").read_bytes() for role in graphs}
refused = ran = 0
for seed in seeds:
    rng = random.Random(seed)
    role = rng.choice(sorted(good))
    raw = bytearray(good[role])
    for _ in range(rng.choice([1, 1, 4, 32])):
        at = rng.randrange(rng.choice([64, 4096, len(raw)]))
        raw[at] = rng.randrange(256) if rng.random() < 0.5 else raw[at] ^ 1 << rng.randrange(8)
    if rng.random() < 0.2:
        raw = raw[: rng.randrange(len(raw))]
    (root / "llm" / f"{role}.gguf").write_bytes(raw)
    try:
        llm = LlamaLanguageModel(root, component, spec, 1)
        ids = np.zeros((1, spec.layout.streams + 1, 2), np.int32)
        ids[:, :-1] = spec.layout.text_vocab
        hidden = llm.forward(ids, (), llm.start(1, 4))
        llm.text_logits(hidden, 0), llm.audio_logits(hidden, 0)
        llm.close()
        ran += 1
    except EdgeOmniError:
        refused += 1
    (root / "llm" / f"{role}.gguf").write_bytes(good[role])
print(refused, ran)
"""


@pytest.mark.parametrize("first", [0, 40])
def test_no_changed_bytes_end_the_process(first: int, root: Path, tmp_path: Path) -> None:
    """In a child process, which ggml would end: every file is refused by our own error, or opened and computed with."""
    here = shutil.copytree(root, tmp_path / "copy")
    command = [sys.executable, "-c", FUZZ, str(here), str(first), str(first + 40)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, ran = map(int, done.stdout.split())
    assert refused + ran == 40 and refused >= 10 and ran >= 3


def test_more_frames_than_were_allocated(root: Path, component: Component, tiny_model: OmniModel) -> None:
    """The context itself refuses, whatever the state believes."""
    llm = LlamaLanguageModel(root, component, tiny_model.spec, 1)
    state = llm.start(1, 3)
    state.capacity = 1000
    with pytest.raises(EngineError, match=r"embeddings \[1, 4, 128\] from position 0 do not fit this cache"):
        llm.forward(random_ids(tiny_model, 4), (), state)
    state.rows = 2
    with pytest.raises(EngineError, match="do not fit this cache"):
        llm.forward(random_ids(tiny_model, 1, rows=2), (), state)
    llm.close()
