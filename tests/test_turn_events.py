"""The events of a turn and the times that it states, by a clock that only moves when told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import ended, small_spec
from fakes import scripted_session as session

from edgeomni import AudioChunk, Sampling, TextDelta, TurnEnd
from edgeomni.spans import Spans

NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
SPEC = small_spec()


# --- events


def test_chunks_compare_by_their_samples() -> None:
    def chunk(value: float = 0.5, count: int = 4, rate: int = 24000, start: float = 0.085) -> AudioChunk:
        return AudioChunk(np.full(count, value, np.float32), rate, start)

    assert chunk() == chunk() and hash(chunk()) == hash(chunk()) and len({chunk(), chunk()}) == 1
    for other in (chunk(value=0.25), chunk(count=5), chunk(rate=16000), chunk(start=0.1), "chunk", TextDelta("x")):
        assert chunk() != other
    assert repr(chunk(count=2048)) == "AudioChunk(2048 samples, 24000 Hz, at 0.085 s)"


def test_chunks_state_their_place_in_the_answer() -> None:
    chunks = [e for e in session().respond("aa", NOISE[:1600]) if isinstance(e, AudioChunk)]
    ends = np.cumsum([len(c.samples) for c in chunks]) / 24000
    assert [c.start_s for c in chunks] == [0.0, *ends[:-1].tolist()] and len(chunks) > 2


def test_ends_compare_without_an_error_and_read_short() -> None:
    s = session()
    first, second = (ended(s.respond("aa", NOISE[:1600])) for _ in range(2))
    assert first.timings["frames_per_s"] > 0, "also of a turn that took no second"
    assert first == first and first != second and len({first, second}) == 2
    assert len(repr(first)) < 200 and "20 frames" in repr(first) and "eoa" in repr(first) and "array" not in repr(first)
    long = TurnEnd("eot", "word " * 100, np.zeros((8, 100), np.int32), 0, {}, Spans())
    assert len(repr(long)) < 200


# --- times


class Clock:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in ("session", "turn", "overlap", "spans"):
            monkeypatch.setattr(f"edgeomni.{module}.perf_counter", lambda: self.now)

    def takes(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: Callable[..., float]) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **how: Any) -> Any:
            self.now += seconds(*args, **how)
            return original(*args, **how)

        monkeypatch.setattr(owner, name, timed)


def test_times_are_those_of_the_first_chunk_and_without_the_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 LLM frames, the 21st is eoa; 13 codec frames in pushes of 3, 1, 2, 4 and the last 3."""
    clock, s = Clock(monkeypatch), session()
    parts = s.components
    clock.takes(monkeypatch, parts.encoder, "encode", lambda *a: 1.0)
    clock.takes(monkeypatch, parts.llm, "forward", lambda ids, *a: 2.0 if ids.shape[2] > 1 else 0.125)
    clock.takes(monkeypatch, parts.codec, "decode", lambda *a: 0.5)
    events = s.respond("aa", NOISE[:1600], two_row=False)
    clock.now += 8.0  # the caller takes its time before the first event
    arrived: list[tuple[type, float]] = []
    for event in events:
        arrived.append((type(event), clock.now - 1000.0))
        clock.now += 16.0  # the listener plays it
    assert isinstance(event, TurnEnd)
    before, steps, pushes = 8.0 + 1.0 + 2.0, 20 * 0.125, 5 * 0.5
    duration = 13 * 64 / 24000
    times = event.timings
    assert times["prefill"] == times["ttft"] == before
    # three texts were listened to; the first push needs codec frame 3, which LLM frame 10 completes, nine steps later
    assert times["ttfa"] == before + 3 * 16.0 + 9 * 0.125 + 0.5
    assert [at for kind, at in arrived if kind is AudioChunk][0] == times["ttfa"]
    assert times["total"] == arrived[-1][1] == before + steps + pushes + 8 * 16.0
    assert times["audio"] == duration
    assert times["rtf"] == (steps + pushes) / duration, "neither prefill nor the listener's time"
    assert times["rtf_turn"] == times["total"] / duration
    assert (times["frames"], times["frames_per_s"]) == (20, 20 / (steps + pushes))
    records = event.spans.records
    assert (sum(records["encoder"]), sum(records["prefill"]), sum(records["codec"])) == (1.0, 2.0, 2.5)


def test_the_clock_starts_at_the_call_also_for_a_cancelled_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, s = Clock(monkeypatch), session()
    events = s.respond("aa", NOISE[:1600])
    clock.now += 4.0
    s.cancel()
    assert ended(events).timings["total"] == 4.0


def test_sampling_is_handed_on() -> None:
    hot = Sampling(temperature=50.0, top_k=None, seed=3)
    cold, warm = ended(session().respond("aa", NOISE)), ended(session().respond("aa", NOISE, sampling=hot))
    assert not np.array_equal(cold.tokens, warm.tokens)
