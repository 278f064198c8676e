"""Closing sessions, and who closes the components that they share."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import ended, script, small_spec
from fakes import scripted_session as session

from edgeomni import Bundle, Session
from edgeomni import runtimes as engines
from edgeomni.components import Components, OpenOptions
from edgeomni.errors import UsageError
from edgeomni.runtimes import fake
from edgeomni.runtimes.choice import Choice

NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
SPEC = small_spec()


def test_a_closed_session_answers_nothing_and_leaves_given_components_open() -> None:
    s = session()
    encoder = s.components.encoder
    assert isinstance(encoder, fake.FakeEncoder)
    with s as same:
        assert same is s
        events = s.respond("aa", NOISE[:1600])
    assert ended(events).reason == "cancelled"
    for closed in (lambda: s.respond("aa", NOISE[:1600]), lambda: s.components, lambda: s.tokenizer):
        with pytest.raises(UsageError, match="closed"):
            closed()
    s.close()
    s.cancel()
    gc.collect()
    assert not encoder.closed, "they belong to the caller"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Components]:
    """What `runtimes.opened` gave out, newest last; its encoders know whether they were closed."""
    monkeypatch.setenv("EDGEOMNI_OVERLAP_CACHE", "0")
    given: list[Components] = []

    def load(bundle: Bundle, choice: Choice, options: OpenOptions, strict: bool) -> engines.Opened:
        given.append(fake.components(SPEC, script(SPEC, 20)))
        return engines.Opened(given[-1], choice.first)

    monkeypatch.setattr(engines, "opened", load)
    return given


def a_bundle() -> Bundle:
    part = SimpleNamespace(engine="onnxruntime", format="onnx", precision="int8", files=())
    manifest = SimpleNamespace(
        spec=SPEC, components=dict.fromkeys(("encoder", "llm", "codec"), part), tokenizer=None, reference=None
    )
    return Bundle(Path("bundle"), manifest)  # type: ignore[arg-type]


def closed(components: Components) -> bool:
    assert isinstance(components.encoder, fake.FakeEncoder)
    return components.encoder.closed


def test_sessions_of_a_bundle_share_what_is_loaded_alike(loads: list[Components]) -> None:
    bundle = a_bundle()
    first, second = Session.open(bundle, threads=2), Session.open(bundle, threads=2)
    assert first.components is second.components
    others = [
        Session.open(bundle, threads=1),
        Session.open(bundle, threads=2, device="cuda"),
        Session.open(bundle, threads=2, engine="onnxruntime"),
        Session.open(a_bundle(), threads=2),
    ]
    assert len({id(s.components) for s in (first, *others)}) == 5
    assert len(loads) == 5


def test_closing_one_session_does_not_close_what_others_use(loads: list[Components]) -> None:
    bundle = a_bundle()
    first, second = Session.open(bundle), Session.open(bundle)
    first.close()
    assert not closed(loads[0]) and ended(second.respond("aa", NOISE[:1600])).reason == "eoa"
    second.close()
    assert not closed(loads[0]), "the Bundle keeps its weights for the next session"
    third = Session.open(bundle)
    assert len(loads) == 1
    del bundle
    assert not closed(loads[0]), "a session is still there"
    third.close()
    assert closed(loads[0])


def test_a_session_opened_by_path_frees_its_components(
    loads: list[Components], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Bundle, "open", lambda path: a_bundle())
    (tmp_path / "bundle.json").write_text("{}")
    with Session.open(tmp_path) as s:
        assert not closed(loads[0])
        events = s.respond("aa", NOISE[:1600])
        next(events)
    assert not closed(loads[0]), "the turn under way still uses them"
    assert ended(events).reason == "cancelled"
    assert closed(loads[0])


def test_opening_tells_what_runs_where(loads: list[Components], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edgeomni")
    Session.open(a_bundle(), threads=3, engine="onnxruntime", overlap="off")
    runs = [f"{name} runs on onnxruntime on cpu (onnx:int8)" for name in ("encoder", "llm", "codec")]
    assert [r.message for r in caplog.records] == [*runs, "threads: 3", "codec beside LLM: off"]
    Session.open(a_bundle())
    assert caplog.records[-2].message == "threads: all cores"


def test_another_engine_than_the_bundles_is_refused(loads: list[Components]) -> None:
    with pytest.raises(UsageError, match="onnx, which torch does not run; engines that do: onnxruntime"):
        Session.open(a_bundle(), engine="torch")
    assert not loads


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'; known are auto, cpu, cuda"):
        Session.open("bundle", device="tpu")  # type: ignore[arg-type]
