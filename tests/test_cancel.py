"""Cancelling a turn at each of its stages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fakes import ended, small_spec
from fakes import scripted_session as session

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.turn import Event

NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
SPEC = small_spec()


class StopAt:
    """Cancels the session when `owner.name` is called, before it does its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, s: Session, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        self.calls = 0

        def stopping(*args: Any, **how: Any) -> Any:
            self.calls += 1
            thread = threading.Thread(target=s.cancel)
            thread.start()
            thread.join()
            return original(*args, **how)

        monkeypatch.setattr(owner, name, stopping)


def assert_cancelled(s: Session, events: Any) -> TurnEnd:
    rest = list(events)
    end = rest[-1]
    assert isinstance(end, TurnEnd) and end.reason == "cancelled"
    assert sum(isinstance(e, TurnEnd) for e in rest) == 1
    assert events.finished
    return end


def test_cancel_before_the_first_event_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session()
    monkeypatch.setattr(s.components.encoder, "encode", None)
    monkeypatch.setattr(s.components.llm, "start", None)
    s.tokenizer.encode = lambda text: [5, 6]  # type: ignore[method-assign]
    for question in ({"task": "aa", "audio": NOISE[:1600]}, {"task": "ta", "text": "x"}):
        events = s.respond(**question)
        s.cancel()
        end = assert_cancelled(s, events)
        assert end.tokens.shape == (8, 0) and end.text == "" and end.timings["audio"] == 0
        assert not {"rtf", "ttfa", "ttft", "prefill", "frames_per_s"} & set(end.timings)


@pytest.mark.parametrize("stage", ["read", "log_mel"])
def test_cancel_while_the_sound_is_loaded_never_reaches_the_encoder(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeomni import audio

    s = session()
    soundfile.write(tmp_path / "q.wav", NOISE, 16000)
    monkeypatch.setattr(s.components.encoder, "encode", None)
    stop = StopAt(monkeypatch, s, audio, stage)
    assert_cancelled(s, s.respond("aa", tmp_path / "q.wav"))
    assert stop.calls == 1


def test_cancel_reaches_the_encoder_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder here computes until its engine is stopped, as ONNX Runtime's run does."""
    s = session()
    running, stopped = threading.Event(), threading.Event()

    def encode(mel: Any, wanted: int | None, interrupt: Interrupt) -> Any:
        with interrupt.stopping(stopped.set):
            running.set()
            assert stopped.wait(10), "nobody stopped the engine"
        raise Interrupted

    def cancel() -> None:
        assert running.wait(10)
        s.cancel()

    monkeypatch.setattr(s.components.encoder, "encode", encode)
    thread = threading.Thread(target=cancel)
    thread.start()
    end = assert_cancelled(s, s.respond("aa", NOISE[:1600]))
    thread.join()
    assert end.tokens.shape == (8, 0) and "encoder" in end.spans.records
    monkeypatch.undo()
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


def test_cancel_between_the_pieces_of_long_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session(small_spec(context=4000))
    stop = StopAt(monkeypatch, s, s.components.encoder, "encode")
    assert_cancelled(s, s.respond("aa", np.tile(NOISE, 31), long_audio="split"))
    assert stop.calls == 1


def test_cancel_during_prefill_gives_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session()
    StopAt(monkeypatch, s, s.components.llm, "forward")
    assert assert_cancelled(s, s.respond("aa", NOISE[:1600])).tokens.shape == (8, 0)


def test_an_interrupted_prefill_is_a_cancelled_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session()

    def forward(*args: Any, **how: Any) -> Any:
        s.cancel()
        raise Interrupted

    monkeypatch.setattr(s.components.llm, "forward", forward)
    assert assert_cancelled(s, s.respond("aa", NOISE[:1600])).tokens.shape == (8, 0)


def test_an_engine_that_fails_after_cancel_is_not_the_listeners_problem(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edgeomni")
    s = session()

    def broken(*args: Any) -> Any:
        if cancelled:
            s.cancel()
        raise EngineError("out of memory")

    monkeypatch.setattr(s.components.codec, "decode", broken)
    for cancelled in (False, True):
        events = s.respond("aa", NOISE[:1600])
        if cancelled:
            assert_cancelled(s, events)
        else:
            with pytest.raises(EngineError, match="out of memory"):
                list(events)
    assert [r.message for r in caplog.records] == ["while the turn was being cancelled: out of memory"]


def test_a_cancelled_turn_keeps_what_it_had_and_adds_no_sound() -> None:
    s = session(frames=30)
    events = s.respond("aa", NOISE[:1600])
    seen: list[Event] = []
    for event in events:
        seen.append(event)
        if sum(isinstance(e, AudioChunk) for e in seen) == 2:
            break
    s.cancel()
    end = assert_cancelled(s, events)
    samples = sum(len(e.samples) for e in seen if isinstance(e, AudioChunk))
    assert end.text == "<1><2><3>" and 0 < end.tokens.shape[1] < 30
    assert end.timings["audio"] == samples / 24000, "the codec's rest is not flushed"


def test_cancel_belongs_to_the_turn_under_way_alone() -> None:
    s = session()
    s.cancel()
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"
    s.cancel()
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"
    shared = Session(s.components, SPEC, None)
    events = shared.respond("aa", NOISE[:1600])
    s.cancel()
    assert ended(events).reason == "eoa", "another session on the same components answers on"


def test_interrupt_stops_calls_that_begin_before_and_after() -> None:
    interrupt = Interrupt()
    stops: list[str] = []
    with interrupt.stopping(lambda: stops.append("over")):
        interrupt.check()
    with interrupt.stopping(lambda: stops.append("outer")), interrupt.stopping(lambda: stops.append("inner")):
        interrupt.set()
    assert stops == ["outer", "inner"] and interrupt.is_set()
    with interrupt.stopping(lambda: stops.append("late")):
        assert stops[-1] == "late"
    with pytest.raises(Interrupted):
        interrupt.check()
