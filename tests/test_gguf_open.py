"""`edgeomni verify --load` opens GGUF components in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeomni.bundle import Bundle, Manifest, write_manifest
from edgeomni.cli.opening import open_apart
from edgeomni.engines import COMPONENTS
from edgeomni.exporters import exporter_of
from edgeomni.model.omni import OmniModel


@pytest.fixture
def bundle(tiny_model: OmniModel, tmp_path: Path) -> Bundle:
    precisions = {"encoder": "q8_0", "llm": "q4_0", "codec": "f16"}
    root = tmp_path / "bundle"
    parts = {str(name): exporter_of("gguf").export(tiny_model, name, root, precisions[name]) for name in COMPONENTS}
    write_manifest(root, Manifest(tiny_model.spec, parts, None, {"weights": "random"}, {}, gate={}))
    return Bundle.open(root, hashes=False)


def test_every_graph_opens_by_itself_and_a_damaged_one_is_named(bundle: Bundle) -> None:
    graphs = {role: bundle.file(g.path) for c in bundle.manifest.components.values() for role, g in c.graphs.items()}
    assert set(graphs) == {"encoder", "body", "heads", "codec"}
    assert {role: open_apart("llama.cpp", path) for role, path in graphs.items()} == dict.fromkeys(graphs, "")
    raw = graphs["heads"].read_bytes()
    graphs["heads"].write_bytes(raw.replace(b"text_head.weight", b"test_head.weight"))
    assert "lacks the tensor text_head.weight" in open_apart("llama.cpp", graphs["heads"])


def test_a_file_that_no_bundle_names(bundle: Bundle) -> None:
    stranger = bundle.path / "llm" / "other.gguf"
    stranger.write_bytes(json.dumps({}).encode())
    assert "no bundle around it names it" in open_apart("llama.cpp", stranger)
