"""Small specs and scripted answers shared by the tests that need no model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from edgeomni import Session, TurnEnd
from edgeomni.bundle import Component, GraphEntry, Manifest, Port, describe_files, write_manifest
from edgeomni.runtimes import fake
from edgeomni.spec import AdapterSpec, BodySpec, CodecSpec, EncoderSpec, FrontEndSpec, OmniSpec, TokenLayout


def small_spec(strides: tuple[int, ...] = (4, 2, 1), codebook: int = 32, **changes: Any) -> OmniSpec:
    codec = CodecSpec("snac", 24000, codebook, strides, 16)
    spec = OmniSpec(
        FrontEndSpec(),
        EncoderSpec(1, 16, 2, 32),
        AdapterSpec("linear"),
        BodySpec("qwen2", 1, 16, 2, 1, 16, 32),
        TokenLayout(100, codebook + 8, codebook, codec.streams, 8),
        codec,
        context=64,
    )
    return dataclasses.replace(spec, **changes)


def script(spec: OmniSpec, frames: int, text: list[int] | None = None, eoa: bool = True) -> list[list[int]]:
    """`frames` LLM frames of distinct audio ids, text ids then eot then pad, and a frame that ends the audio."""
    layout = spec.layout
    words = (text or [1, 2, 3]) + [layout.eot]
    out = []
    for i in range(frames):
        audio = [(3 * i + k) % layout.codebook_size for k in range(layout.streams)]
        out.append([*audio, words[i] if i < len(words) else 7])
    if eoa:
        out.append([*[0] * (layout.streams - 1), layout.eoa, 7])
    return out


def small_bundle(
    root: Path,
    spec: OmniSpec,
    *,
    licences: dict[str, str] | None = None,
    gate: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    prefix: str = "",
) -> Path:
    """A bundle of the smallest files that pass for ONNX graphs and tables: it can be opened and verified, not run.

    Each graph is 150 bytes: the ONNX field `producer_name`, then `doc_string`.
    """
    flavour = {"flavour": "ort"}
    layout = spec.layout
    rows = {"text": layout.text_vocab, "audio": layout.streams * layout.audio_vocab}
    place = {"offset": 0, "dtype": "float", "shape": [1]}
    tables = {
        name: {"file": f"llm/{name}.bin", "rows": n, "width": spec.body.width, "scheme": "fp32", "codes": place}
        for name, n in rows.items()
    }
    codec = {
        "first_push": 1,
        "push_multiple": 1,
        "lag_samples": 0,
        "states": [],
        "tails": [],
        "bounds": [],
        "noise": [],
    }
    metas: dict[str, dict[str, Any]] = {
        "encoder": flavour,
        "llm": {**flavour, "attention": "gqa", "context": 64, "tables": tables},
        "codec": {**flavour, **codec},
    }
    roles = {"encoder": ["encoder"], "llm": ["body", "text_head", "audio_head"], "codec": ["codec"]}
    parts = {name: _small_component(root, name, roles[name], meta, prefix) for name, meta in metas.items()}
    (root / "tokenizer.json").write_text("{}")
    tokenizer = describe_files(root, [root / "tokenizer.json"])[0]
    gate = gate or {"fidelity": {"llm.top1": {"value": 0.999, "at_least": 0.995, "verdict": "pass"}}}
    licences = licences or {"llm": "Apache-2.0"}
    write_manifest(root, Manifest(spec, parts, tokenizer, {"weights": "random", **(facts or {})}, licences, gate))
    return root


def _small_component(root: Path, name: str, roles: list[str], meta: dict[str, Any], prefix: str) -> Component:
    folder = root / name
    folder.mkdir(parents=True)
    for role in roles:
        (folder / f"{prefix}{role}.onnx").write_bytes(b"\x12\x14" + role.encode().ljust(20) + b"\x32\x7e" + b"d" * 126)
    for table in meta.get("tables", {}).values():
        (root / table["file"]).write_bytes(b"\0" * 4)
    ports = [Port(n, "float", [1, "t"]) for n in ("x", "y.0", "y.1")]
    graphs = {role: GraphEntry(f"{name}/{prefix}{role}.onnx", ports[:1], ports[1:]) for role in roles}
    files = describe_files(root, folder.iterdir())
    return Component(name, "onnxruntime", "onnx", "int8", {"all": "int8"}, graphs, meta, files)


def scripted_session(spec: OmniSpec | None = None, frames: int = 20, **how: Any) -> Session:
    """A session whose answer is `script(spec, frames)`."""
    spec = spec or small_spec()
    return Session(fake.components(spec, script(spec, frames, **how)), spec, None)


def ended(events: Iterable[Any]) -> TurnEnd:
    """The end of a turn, all else taken."""
    *_, end = events
    assert isinstance(end, TurnEnd)
    return end


class Clock:
    """A clock that moves only when it is told to, in place of `perf_counter` in every edgeomni module."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = [m for name, m in list(sys.modules.items()) if name.startswith("edgeomni")]
        for module in modules:
            if getattr(module, "perf_counter", None) is perf_counter:
                monkeypatch.setattr(module, "perf_counter", self)

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """From now on each call of owner.name takes that long."""
        original = getattr(owner, name)

        def timed(*args: Any, **how: Any) -> Any:
            self.advance(seconds)
            return original(*args, **how)

        monkeypatch.setattr(owner, name, timed)
