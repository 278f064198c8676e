"""Spans and the headline figures of a turn, on a clock that moves only when a fake component takes its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import Clock, script, small_spec

from edgeomni import AudioChunk, Session, TextDelta, TurnEnd
from edgeomni.runtimes import fake
from edgeomni.spans import Spans

SECOND_OF_NOISE = np.random.default_rng(0).standard_normal(1600).astype(np.float32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.install(monkeypatch)
    return clock


def test_spans_collect_durations_by_name_in_order(clock: Clock) -> None:
    spans = Spans()
    for seconds in (2, 3):
        clock.advance(10)  # outside of any span
        with spans("a"):
            clock.advance(seconds)
            with spans("b"):
                clock.advance(1)
    assert dict(spans.records) == {"a": [3, 4], "b": [1, 1]}
    assert (spans.total("a"), spans.total("b")) == (7, 2)


def test_a_span_that_fails_counts_as_well_and_lets_the_error_through(clock: Clock) -> None:
    spans = Spans()
    with pytest.raises(KeyError), spans("a"):
        clock.advance(5)
        raise KeyError
    assert spans.records["a"] == [5]


def test_asking_for_a_total_makes_no_record() -> None:
    spans = Spans()
    assert spans.total("never") == 0 and "never" not in spans.records


def turn(monkeypatch: pytest.MonkeyPatch, clock: Clock, listener: Callable[[], None]) -> tuple[list[Any], TurnEnd]:
    """An answer of 20 frames, hence 13 codec frames, pushed as 3, 1, 2, 4 and 3 with the end.

    The encoder takes 8 s, each body step 4 s (prefill: two), a text head 1 s (4 of them), audio heads 2 s, a push 16 s.
    """
    spec = small_spec()
    session = Session(fake.components(spec, script(spec, 20)), spec, None)
    parts = session.components
    clock.slow(monkeypatch, parts.encoder, "encode", 8)
    for name, seconds in (("forward", 4), ("text_logits", 1), ("audio_logits", 2)):
        clock.slow(monkeypatch, parts.llm, name, seconds)
    clock.slow(monkeypatch, parts.codec, "decode", 16)
    events: list[Any] = []
    for event in session.respond("aa", SECOND_OF_NOISE):
        events.append(event)
        listener()
    assert isinstance(event, TurnEnd)
    return events, event


AUDIO_S = 13 * 64 / 24000
BUSY_S = 20 * 4 + 4 * 1 + 21 * 2 + 5 * 16
FIRST_FRAME_S = 8 + 2 * 4 + 1 + 2


def test_headline_figures(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    _, end = turn(monkeypatch, clock, lambda: None)
    figures = end.timings
    assert figures["ttft"] == FIRST_FRAME_S
    # frame 9 completes codec frames 0 to 2, the first push; the text ends with frame 3
    assert figures["ttfa"] == FIRST_FRAME_S + 9 * (4 + 2) + 3 * 1 + 16
    assert figures["total"] == 8 + 2 * 4 + BUSY_S
    assert figures["audio"] == AUDIO_S
    assert figures["rtf"] == pytest.approx(BUSY_S / AUDIO_S)
    assert figures["rtf_turn"] == pytest.approx((8 + 2 * 4 + BUSY_S) / AUDIO_S)
    assert figures["frames"] == 20 and figures["frames_per_s"] == pytest.approx(20 / BUSY_S)


def test_a_slow_listener_costs_the_loop_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    events, end = turn(monkeypatch, clock, lambda: clock.advance(1000))
    assert end.timings["rtf"] == pytest.approx(BUSY_S / AUDIO_S)
    assert end.timings["frames_per_s"] == pytest.approx(20 / BUSY_S)
    assert end.timings["ttft"] == FIRST_FRAME_S, "nothing was listened to before the first text"
    assert end.spans.total("frame") == 20 * 4 + 4 * 1 + 21 * 2


def test_chunks_say_where_they_start(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """The fake codec holds one frame back: pushes of 3, 1, 2, 4 and the last 3 give 2, 1, 2, 4 and 4 frames."""
    events, end = turn(monkeypatch, clock, lambda: None)
    chunks = [e for e in events if isinstance(e, AudioChunk)]
    assert [len(c.samples) // 64 for c in chunks] == [2, 1, 2, 4, 4]
    assert [c.start_s for c in chunks] == pytest.approx([n * 64 / 24000 for n in (0, 2, 3, 5, 9)])
    assert {c.sample_rate for c in chunks} == {24000}
    assert [e.text for e in events if isinstance(e, TextDelta)] == ["<1>", "<2>", "<3>"]
