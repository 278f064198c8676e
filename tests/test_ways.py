"""The ways to run a component, and what a choice between them asks for: on manifests alone, no engine is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import small_spec

from edgeomni import Bundle
from edgeomni.engines import COMPONENTS, Engine
from edgeomni.errors import EngineError, UsageError
from edgeomni.measured import Run
from edgeomni.runtimes import choice

ORT, OPENVINO = "onnxruntime on cpu (onnx:fp32)", "openvino on cpu (openvino:fp32)"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: False)


def entry(format_: str) -> Any:
    return SimpleNamespace(format=format_, precision="fp32", meta={}, files=())


def bundle(*formats: str, only: Sequence[str] = COMPONENTS) -> Bundle:
    """Each component in the first format, and as alternatives in the others; those not in `only` without these."""
    first, *others = (entry(name) for name in formats)
    manifest = SimpleNamespace(
        spec=small_spec(),
        components=dict.fromkeys(COMPONENTS, first),
        alternatives=dict.fromkeys(only, others),
    )
    return Bundle(Path("bundle"), manifest)  # type: ignore[arg-type]


def labels(ways: Sequence[choice.Way]) -> list[str]:
    return [way.label for way in ways]


def able(engine: Engine, device: str) -> str:
    return ""


def without_llama(engine: Engine, device: str) -> str:
    return "not there" if engine.name == "llama.cpp" else ""


def run(ways: dict[str, str], ttfa: float) -> Run:
    return Run("b", [], 1, {"seconds": 1.0}, ways, {}, "2026", {}, ttfa, 0.5)


def test_an_alternative_in_an_unknown_format_is_left_out() -> None:
    for formats in (("onnx", "npu9"), ("npu9", "onnx")):
        assert labels(choice.ways_of(bundle(*formats), "llm")) == [ORT]
    with pytest.raises(EngineError, match="npu9"):
        choice.ways_of(bundle("npu9"), "llm")


def test_a_device_is_the_engine_s_own_choice_where_the_engine_is_insisted_on() -> None:
    both = bundle("onnx", "openvino")

    def devices(*how: Any) -> list[str]:
        return [f"{way.engine.name} {way.device}" for way in choice.ways_of(both, "llm", *how)]

    assert devices(None, "auto") == ["onnxruntime cpu", "openvino cpu"] == devices() == devices("auto", "auto")
    assert devices("openvino", "auto") == ["openvino auto"] and devices("openvino") == ["openvino cpu"]
    assert devices("onnxruntime", "auto") == ["onnxruntime cpu"]
    assert devices(None, "npu") == ["openvino npu"] and devices({"llm": "openvino"}, "cpu") == ["openvino cpu"]
    with pytest.raises(UsageError, match="the llm runs on onnxruntime, which knows no device npu; leave --device out"):
        choice.ways_of(both, "llm", "onnxruntime", "npu")


def test_each_engine_and_device_is_asked_once_and_the_last_way_not_at_all() -> None:
    asked: list[str] = []

    def probe(engine: Engine, device: str) -> str:
        asked.append(f"{engine.name} {device}")
        return "it is not there" if engine.name == "openvino" else ""

    made = choice.choose(bundle("openvino", "onnx", only=("llm", "codec")), probe, lambda: [])
    assert {name: way.label for name, way in made.first.items()} == {"encoder": OPENVINO, "llm": ORT, "codec": ORT}
    assert asked == ["openvino cpu"]
    (step, other) = made.steps()
    assert (step.component, other.component) == ("llm", "codec") and step.instead.label == ORT
    assert [(way.label, reason) for way, reason in step.passed] == [(OPENVINO, "it is not there")]


def test_profiles_are_asked_for_only_where_there_is_a_choice() -> None:
    def profiles() -> Sequence[Run]:
        raise AssertionError("there is none")

    assert choice.choose(bundle("onnx"), able, profiles).measured is None
    with pytest.raises(AssertionError):
        choice.choose(bundle("onnx", "openvino", only=("codec",)), able, profiles)


def test_the_fastest_profile_that_can_be_had_decides() -> None:
    """One names a way that the bundle lacks, one an engine that is not there; the way chosen is not there twice."""
    first: dict[str, str] = dict.fromkeys(("encoder", "llm", "codec"), ORT)
    fit = run({**first, "llm": OPENVINO}, 0.8)
    known = [
        run(first, 1.0),
        run({**first, "llm": "steam on cpu (onnx:fp32)"}, 0.1),
        run({**first, "codec": "llama.cpp on cpu (gguf:fp32)"}, 0.2),
        run({**first, "encoder": OPENVINO}, 0.9),
        fit,
    ]
    made = choice.choose(bundle("onnx", "gguf", "openvino"), without_llama, lambda: known)
    gguf = "llama.cpp on cpu (gguf:fp32)"
    assert labels(made.ways["llm"]) == [OPENVINO, ORT, gguf] and labels(made.ways["codec"]) == [ORT, gguf, OPENVINO]
    assert made.measured == fit and not made.steps()
    made = choice.choose(bundle("onnx", "gguf", "openvino"), able, lambda: known[:2])
    assert made.measured is None and labels(made.ways["llm"]) == [ORT, gguf, OPENVINO]
