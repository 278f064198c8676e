"""Bundles with a component in several formats, and an engine that can be told to fail: for tests of the choice."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.bundle import Bundle, write_manifest
from edgeomni.components import OpenOptions
from edgeomni.engines import COMPONENTS, ENGINES, Engine
from edgeomni.exporters import exporter_of, options_of
from edgeomni.manifest import Component, Manifest

QUESTION = (0.2 * np.sin(np.arange(16000) * 0.05) * np.sin(np.arange(16000) * 0.0007)).astype(np.float32)


def bare_bundle(model: Any, root: Path, format_: str, precision: str, **options: Any) -> Bundle:
    """A bundle that nothing has judged."""
    root.mkdir(parents=True)
    components = {}
    for name in COMPONENTS:
        writer = exporter_of(format_)
        chosen = precision if name != "codec" else {"onnx": "fp32", "gguf": "f16"}[format_]
        components[name] = writer.export(model, name, root, chosen, options_of(format_, options))
    path = root / "tokenizer.json"
    tokenizer = None
    if model.tokenizer_json is not None:
        from edgeomni.bundle import describe_files

        path.write_text(model.tokenizer_json, encoding="utf-8")
        tokenizer = describe_files(root, [path])[0]
    gate = {"engines": {}, "passed": True, "made": format_}
    write_manifest(root, Manifest(model.spec, components, tokenizer, dict(model.provenance), {}, gate))
    return Bundle.open(root)


def answer(session: Session) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the sound of one forced answer."""
    codes = np.random.default_rng(5).integers(0, session.spec.codec.codebook_size, (12, 7))
    events = list(session.respond("aa", QUESTION, forced_codes=codes, forced_text_end=6))
    assert isinstance(events[-1], TurnEnd)
    return events[-1].tokens, np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)])


class GpuEngine:
    """Stands for an engine of a GPU and its format "phantom"; the module edgeomni.runtimes.phantom.

    It opens what ONNX Runtime opens of the same files on the CPU, so that its answers are real, unless it is told to
    fail: `fails` component -> the exception that opening it raises, `cannot`: what `problem` says.
    """

    def __init__(self) -> None:
        self.fails: dict[str, Exception] = {}
        self.cannot = ""
        self.opened: list[str] = []
        self.parts: list[Any] = []

    def problem(self, device: str) -> str:
        assert device == "cuda"
        return self.cannot

    def version(self) -> str:
        return "9.9"

    def open_component(self, bundle: Bundle, name: str, options: OpenOptions) -> Any:
        from edgeomni.runtimes import onnxruntime

        assert options.device == "cuda" and bundle.manifest.components[name].format == "phantom"
        self.opened.append(name)
        if name in self.fails:
            raise self.fails[name]
        real = {key: as_format(part, "onnx") for key, part in bundle.manifest.components.items()}
        self.parts.append(
            onnxruntime.open_component(bundle.with_components(real), name, replace(options, device="cpu"))
        )
        return self.parts[-1]


def as_format(component: Component, format_: str) -> Component:
    return replace(component, format=format_)


@pytest.fixture
def gpu_engine(monkeypatch: pytest.MonkeyPatch) -> GpuEngine:
    """The engine "phantom", registered behind the others; no profile and no GPU is on this machine."""
    from edgeomni import runtimes
    from edgeomni.runtimes import choice

    engine = GpuEngine()
    line = Engine("phantom", "phantom", ("phantom",), ("cuda",), "", ("phantom",))
    monkeypatch.setitem(ENGINES, "phantom", line)
    monkeypatch.setitem(sys.modules, "edgeomni.runtimes.phantom", engine)
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(runtimes, "_said", set())
    return engine


def for_gpu(bundle: Bundle, components: tuple[str, ...] = COMPONENTS) -> Bundle:
    """The same bundle as one that was made for the engine "phantom", its own components as alternatives."""
    made = {name: as_format(bundle.manifest.components[name], "phantom") for name in components}
    other = bundle.with_components(made)
    other.manifest.alternatives = {name: [bundle.manifest.components[name]] for name in components}
    return other


def labels(ways: Mapping[str, Any]) -> dict[str, str]:
    return {name: way.label for name, way in ways.items()}
