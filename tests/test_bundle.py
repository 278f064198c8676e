"""Bundles: what is written is read; what is damaged, foreign or escaping is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import small_spec

from edgeomni.bundle import MANIFEST, Bundle, Component, Manifest, describe_files, write_manifest
from edgeomni.errors import BundleError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    parts = {}
    for name in ("encoder", "llm", "codec"):
        (root / name).mkdir(parents=True)
        (root / name / "g.onnx").write_bytes(name.encode() * 50)
        graphs = {name: {"path": f"{name}/g.onnx", "inputs": [], "outputs": []}}
        files = describe_files(root, [root / name / "g.onnx"])
        parts[name] = Component(name, "onnxruntime", "onnx", "int4", {}, graphs, {}, files)
    (root / "tokenizer.json").write_text("{}")
    tokenizer = describe_files(root, [root / "tokenizer.json"])[0]
    write_manifest(root, Manifest(small_spec(), parts, tokenizer, {"weights": "random"}, {"llm": "Apache-2.0"}, {}))
    return root


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((root / MANIFEST).read_text())
    change(data)
    (root / MANIFEST).write_text(json.dumps(data))


def test_what_is_written_is_read(root: Path) -> None:
    bundle = Bundle.open(root)
    assert bundle.spec == small_spec() and bundle.manifest.components["llm"].precision == "int4"
    assert bundle.size == sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != MANIFEST)
    assert bundle.digest == Bundle.open(root).digest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def link_out(root: Path) -> None:
    (root / "llm" / "g.onnx").rename(root.parent / "elsewhere")
    (root / "llm" / "g.onnx").symlink_to(root.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda r: flip(r / "llm" / "g.onnx"), r"llm/g.onnx differ.*SHA-256"),
    "missing file": (lambda r: (r / "codec" / "g.onnx").unlink(), "codec/g.onnx is missing"),
    "truncated file": (lambda r: (r / "llm" / "g.onnx").write_bytes(b"x"), "llm/g.onnx has 1 bytes instead of 150"),
    "foreign schema": (lambda r: edit(r, lambda d: d.update(schema=99)), "schema version 99"),
    "no schema": (lambda r: edit(r, lambda d: d.pop("schema")), "schema version None"),
    "dot dot": (lambda r: edit(r, lambda d: d["components"]["llm"]["files"][0].update(path="../x")), "not among"),
    "dot dot in all": (lambda r: edit(r, lambda d: d["tokenizer"].update(path="../t.json")), "'../t.json' leaves"),
    "absolute": (lambda r: edit(r, lambda d: d["tokenizer"].update(path="/etc/passwd")), "'/etc/passwd' leaves"),
    "link out": (link_out, "'llm/g.onnx' leaves"),
    "no manifest": (lambda r: (r / MANIFEST).unlink(), "has no bundle.json"),
    "not JSON": (lambda r: (r / MANIFEST).write_text("{"), "not valid JSON"),
    "a list": (lambda r: (r / MANIFEST).write_text("[]"), "not a manifest"),
    "component gone": (lambda r: edit(r, lambda d: d["components"].pop("codec")), "codec missing"),
    "spec broken": (lambda r: edit(r, lambda d: d["spec"].pop("body")), "'body' is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, root: Path) -> None:
    damage, message = DAMAGE[case]
    damage(root)
    with pytest.raises(BundleError, match=message):
        Bundle.open(root)


def test_hashes_are_remembered_but_verify_looks_again(root: Path) -> None:
    bundle = Bundle.open(root)
    stat = (root / "llm" / "g.onnx").stat()
    flip(root / "llm" / "g.onnx")
    os.utime(root / "llm" / "g.onnx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    Bundle.open(root)  # same size and time: not hashed a second time
    with pytest.raises(BundleError, match="llm/g.onnx"):
        bundle.verify()
    with pytest.raises(BundleError, match="llm/g.onnx"):
        Bundle.open(root, hashes=True)
