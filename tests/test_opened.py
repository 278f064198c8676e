"""What is told, and raised, when components are opened: with an engine that opens nothing real."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import small_spec

from edgeomni import Bundle, runtimes
from edgeomni.components import OpenOptions
from edgeomni.engines import COMPONENTS, ENGINES, Engine
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.runtimes import choice


class Steam:
    """The engine "steam", on a CPU and on a GPU, and its folder. `fails`: device -> what opening there raises."""

    def __init__(self) -> None:
        self.fails: dict[str, Exception] = {}
        self.opened: list[tuple[str, OpenOptions]] = []

    def version(self) -> str:
        return "2.0"

    def open_component(self, bundle: Bundle, name: str, options: OpenOptions) -> Any:
        if options.device in self.fails:
            raise self.fails[options.device]
        self.opened.append((name, options))
        return SimpleNamespace(close=lambda: None)


@pytest.fixture
def steam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steam:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = Steam()
    monkeypatch.setitem(ENGINES, "steam", Engine("steam", "steam", ("steam",), ("cpu", "cuda"), "", ("steam",)))
    monkeypatch.setitem(sys.modules, "edgeomni.runtimes.steam", engine)
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(runtimes, "_said", set())
    return engine


def bundle(**judged: Any) -> Bundle:
    part = SimpleNamespace(format="steam", precision="int8", meta={}, files=())
    manifest: Any = SimpleNamespace(
        spec=small_spec(),
        components=dict.fromkeys(COMPONENTS, part),
        alternatives={},
        gate=judged,
        tokenizer=None,
        reference=None,
    )
    there = Bundle(Path("b"), manifest)
    there.with_components = lambda entries: there  # type: ignore[method-assign]
    return there


def test_all_three_are_opened_on_the_first_device_with_the_options_given(
    steam: Steam, caplog: pytest.LogCaptureFixture
) -> None:
    opened = runtimes.opened(bundle(), runtimes.chosen(bundle()), OpenOptions(3, device="npu"))
    assert steam.opened == [(name, OpenOptions(3, device="cuda")) for name in COMPONENTS]
    assert {way.label for way in opened.ways.values()} == {"steam on cuda (steam:int8)"}
    assert opened.steps == () and caplog.records == []


@pytest.mark.parametrize(
    ("judged", "told"),
    [
        ({}, 0),
        ({"engines": {}}, 0),
        ({"engines": {"steam": "2.0"}}, 0),
        ({"engines": {"onnxruntime": "0.1"}}, 0),
        ({"engines": "2.0"}, 0),
        ({"engines": {"steam": "1.9", "onnxruntime": "0.1"}}, 1),
    ],
)
def test_a_bundle_judged_with_another_version_of_its_engine_is_told_of(
    judged: dict[str, Any], told: int, steam: Steam, caplog: pytest.LogCaptureFixture
) -> None:
    there = bundle(**judged)
    runtimes.opened(there, runtimes.chosen(there), OpenOptions(1))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == told
    assert all("was judged with steam 1.9, and this machine has 2.0" in text for text in said)


def test_what_judges_a_component_runs_on_a_cpu(steam: Steam, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtimes.chosen_engine(bundle(), "llm").name == "steam"
    graphs = bundle()
    graphs.manifest.components["llm"] = SimpleNamespace(format="tensorrt", precision="fp16", meta={})  # type: ignore[assignment]
    assert [way.engine.name for way in choice.ways_of(graphs, "llm")] == ["tensorrt", "onnxruntime", "onnxruntime"]
    assert runtimes.chosen_engine(graphs, "llm").name == "onnxruntime"
    assert runtimes.chosen_engine(graphs, "llm", "tensorrt").name == "tensorrt", "which has no CPU"
    runtimes.open_components(bundle(), OpenOptions(1, device="cpu"))
    assert [options.device for _, options in steam.opened] == ["cpu"] * 3
    steam.fails = {"cuda": EngineError("it is cold")}
    other = Engine("vapour", "steam", ("vapour", "steam"), ("cuda",), "", ("steam",))
    monkeypatch.setitem(ENGINES, "vapour", other)
    with pytest.raises(EngineError, match="^it is cold$"):  # and no step down to another engine
        runtimes.open_components(bundle(), OpenOptions(1, device="cuda"))


@pytest.mark.parametrize(
    ("last", "kind", "said"),
    [
        (MemoryError(), "memory", "too little memory to open the bundle; close other programs"),
        (EngineUnavailable("damaged", "cut short"), "damaged", "cut short"),
        (EngineError("odd"), "graph", "odd"),
    ],
)
def test_the_last_way_s_failure_is_raised_with_those_before_it(
    last: Exception, kind: str, said: str, steam: Steam, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    steam.fails = {"cuda": MemoryError(), "cpu": last}
    with pytest.raises(EngineUnavailable) as caught:
        runtimes.opened(bundle(), runtimes.chosen(bundle()), OpenOptions(1))
    assert caught.value.kind == kind and str(caught.value) == (
        f"{said}. What was tried before that: steam on cuda (steam:int8): too little memory"
    )
    with pytest.raises(EngineError) as caught_alone:
        runtimes.opened(bundle(), runtimes.chosen(bundle(), device="cpu"), OpenOptions(1))
    assert str(caught_alone.value) == said and caplog.records == []
