"""What sessions of one Bundle share, by what they asked for, and checkpoints opened on torch."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import script, small_spec

from edgeomni import Bundle, Session, loaded
from edgeomni import runtimes as engines
from edgeomni.components import OpenOptions
from edgeomni.engines import COMPONENTS
from edgeomni.errors import CheckpointError, UsageError
from edgeomni.loaded import Ask, Loaded, from_bundle, from_checkpoint
from edgeomni.runtimes import fake
from edgeomni.runtimes.choice import Choice

SPEC = small_spec()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[OpenOptions]:
    """The options of each time that components were opened. Nothing is timed: the codec beside the LLM is faster."""
    monkeypatch.setattr(loaded, "fastest", lambda *given: "on")
    monkeypatch.setattr(loaded, "remembered", lambda bundle, options, ways: "off" if options.threads == 1 else None)
    seen: list[OpenOptions] = []

    def load(bundle: Bundle, choice: Choice, options: OpenOptions, strict: bool) -> engines.Opened:
        seen.append(options)
        return engines.Opened(fake.components(SPEC, script(SPEC, 20)), choice.first)

    monkeypatch.setattr(engines, "opened", load)
    return seen


@pytest.fixture
def bundle() -> Bundle:
    part = SimpleNamespace(engine="onnxruntime", format="onnx", precision="int8", files=())
    manifest = SimpleNamespace(spec=SPEC, components=dict.fromkeys(COMPONENTS, part), tokenizer=None, reference=None)
    return Bundle(Path("bundle"), manifest)  # type: ignore[arg-type]


def test_components_that_compute_side_by_side_are_opened_for_it(bundle: Bundle, asked: list[OpenOptions]) -> None:
    """Sessions that leave the mode open, and shall compute one after the other, take what is open already."""
    alone = from_bundle(bundle, Ask(1))
    assert (alone.overlap, asked) == ("off", [OpenOptions(1, side_by_side=False)])
    beside = from_bundle(bundle, Ask(1, overlap="on"))
    assert (beside.overlap, asked[1:]) == ("on", [OpenOptions(1, side_by_side=True)])
    again = from_bundle(bundle, Ask(1))
    assert (again.overlap, again.model is beside.model) == ("off", True)
    told = from_bundle(bundle, Ask(1, overlap="off"))
    assert (told.overlap, told.model is alone.model) == ("off", True)
    timed = from_bundle(bundle, Ask(2))
    assert (timed.overlap, asked[2:]) == ("on", [OpenOptions(2, side_by_side=True)])


def test_engines_named_in_another_order_are_the_same(bundle: Bundle, asked: list[OpenOptions]) -> None:
    first = from_bundle(bundle, Ask(1, engine={"llm": "onnxruntime", "codec": "onnxruntime"}))
    second = from_bundle(bundle, Ask(1, engine={"codec": "onnxruntime", "llm": "onnxruntime"}))
    third = from_bundle(bundle, Ask(1, engine={"llm": "onnxruntime"}))
    assert first.model is second.model and first.model is not third.model and len(asked) == 2


def test_the_way_of_each_component_is_told(
    bundle: Bundle, asked: list[OpenOptions], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edgeomni")
    opened = from_bundle(bundle, Ask(1))
    assert opened.ways == dict.fromkeys(COMPONENTS, "onnxruntime on cpu (onnx:int8)") and opened.measured is None
    expected = [f"{name} runs on onnxruntime on cpu (onnx:int8)" for name in COMPONENTS]
    assert [r.getMessage() for r in caplog.records] == expected, "and no profile"


@pytest.mark.parametrize("engine", ["onnxruntime", {"llm": "torch", "codec": "onnxruntime"}])
def test_a_checkpoint_runs_on_torch_alone(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a checkpoint, which runs on torch; export it to run it on onnxruntime"):
        from_checkpoint(tmp_path / "missing", Ask(engine=engine))
    with pytest.raises(CheckpointError, match="missing: no such bundle or checkpoint directory"):
        from_checkpoint(tmp_path / "missing", Ask(engine={"llm": "torch", "codec": "auto"}))


def test_a_checkpoint_stays_on_the_cpu_and_computes_one_after_the_other(tiny_dir: Path) -> None:
    opened: list[Loaded] = [from_checkpoint(tiny_dir, ask) for ask in (Ask(), Ask(device="auto"), Ask(overlap="on"))]
    assert [one.overlap for one in opened] == ["off", "off", "on"]
    for one in opened:
        assert one.ways == dict.fromkeys(COMPONENTS, "torch on cpu (checkpoint:fp32)")
    with Session.open(tiny_dir, threads=1) as session:
        assert (session.overlap, session.ways, session.measured) == ("off", opened[0].ways, None)
