"""Turns of a Session on scripted components: checks at the call, cancelling, freeing, limits and times."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from fakes import script, small_spec

from edgeomni import AudioChunk, Bundle, Sampling, Session, TextDelta, TurnEnd
from edgeomni import runtimes as engines
from edgeomni.audio import resample
from edgeomni.components import Components
from edgeomni.errors import AudioError, EngineError, PromptError, UsageError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.runtimes import fake
from edgeomni.spans import Spans
from edgeomni.spec import OmniSpec
from edgeomni.turn import Event

NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
SPEC = small_spec()


def session(spec: OmniSpec = SPEC, frames: int = 20, **how: Any) -> Session:
    return Session(fake.components(spec, script(spec, frames, **how)), spec, None)


def ended(events: Any) -> TurnEnd:
    *_, end = events
    assert isinstance(end, TurnEnd)
    return end


# --- what is wrong is said at the call


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"task": "sing"}, PromptError, "sing"),
        ({"audio": None}, PromptError, "needs spoken audio"),
        ({"audio": NOISE[:0]}, AudioError, "zero length"),
        ({"audio": np.zeros(1600, np.float32)}, AudioError, "silent"),
        ({"audio": "no/such.wav"}, AudioError, "no/such.wav: no such sound file"),
        ({"audio": [0.1, 0.2]}, UsageError, "array of samples or the path"),
        ({"audio": NOISE, "text": "x"}, UsageError, "leave text out"),
        ({"task": "ta", "audio": NOISE, "text": "x"}, UsageError, "leave audio out"),
        ({"task": "ta", "audio": None, "text": "x", "sample_rate": 8000}, UsageError, "takes text"),
        ({"task": "ta", "audio": None, "text": "x", "channel": 0}, UsageError, "takes text"),
        ({"task": "ta", "audio": None}, PromptError, "question in text"),
        ({"sample_rate": 100}, AudioError, "100 Hz"),
        ({"sample_rate": 16000.0}, AudioError, "16000.0 Hz"),
        ({"channel": 0}, UsageError, "samples are mono"),
        ({"long_audio": "cut"}, UsageError, "refuse or split, not 'cut'"),
        ({"encoder_window": 31}, UsageError, "encoder window"),
        ({"encoder_window": 0}, UsageError, "encoder window"),
        ({"encoder_window": True}, UsageError, "encoder window"),
        ({"encoder_window": "wide"}, UsageError, "encoder window"),
        ({"encoder_window": 0.05}, AudioError, "lasts 0.1 s.*window is 0.04 s"),
        ({"audio": np.tile(NOISE, 31)}, AudioError, "lasts 31.0 s"),
        ({"audio": np.tile(NOISE, 16), "sample_rate": 8000}, AudioError, "lasts 32.0 s"),
        ({"max_length": 0}, UsageError, "max_length"),
        ({"max_seconds": 0.002}, UsageError, "one codec frame"),
        ({"max_seconds": float("inf")}, UsageError, "max_seconds"),
        ({"max_seconds": float("nan")}, UsageError, "max_seconds"),
        ({"max_seconds": True}, UsageError, "max_seconds"),
        ({"task": "asr", "max_seconds": 3}, UsageError, "answers in text"),
        ({"noise_seed": -1}, UsageError, "noise_seed"),
        ({"forced_codes": np.zeros((3, 6), np.int64)}, UsageError, r"\[frames, 7\]"),
        ({"forced_codes": np.zeros(7, np.int64)}, UsageError, r"\[frames, 7\]"),
        ({"history": [("hello", "hi")]}, PromptError, "1 turn.* of history"),
    ],
)
def test_wrong_arguments_raise_at_the_call_and_leave_the_session_free(
    arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    s = session()
    s.tokenizer.encode = lambda text: [5, 6]  # type: ignore[method-assign]
    with pytest.raises(error, match=said):
        s.respond(**{"task": "aa", "audio": NOISE[:1600], **arguments})
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


def test_the_longest_audio_that_fits_is_taken() -> None:
    s = session(small_spec(context=4000))
    assert ended(s.respond("aa", np.tile(NOISE, 30))).reason == "eoa"
    assert ended(s.respond("aa", np.tile(NOISE, 15), sample_rate=8000)).reason == "eoa"
    end = ended(s.respond("aa", np.tile(NOISE, 31), long_audio="split"))
    assert len(end.spans.records["encoder"]) == 2


def test_a_session_answers_one_question_at_a_time() -> None:
    s = session()
    first = s.respond("aa", NOISE[:1600])
    with pytest.raises(UsageError, match="answering already"):
        s.respond("aa", NOISE[:1600])
    assert ended(first).reason == "eoa", "the refused question did the first no harm"
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


def test_a_turn_that_nobody_holds_frees_the_session() -> None:
    s = session()
    s.respond("aa", NOISE[:1600])
    begun = s.respond("aa", NOISE[:1600])
    next(begun)
    llm = s.components.llm
    assert isinstance(llm, fake.FakeLanguageModel) and llm.states
    del begun
    assert not llm.states, "its KV cache went with it"
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


def test_a_turn_dropped_in_a_reference_cycle_frees_the_session_too() -> None:
    s = session()
    cycle: list[Any] = [s.respond("aa", NOISE[:1600])]
    cycle.append(cycle)
    del cycle
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


def test_a_closed_turn_frees_the_session() -> None:
    s = session()
    unbegun = s.respond("aa", NOISE[:1600])
    unbegun.close()
    with s.respond("aa", NOISE[:1600]) as events:
        next(events)
    assert list(events) == [] and events.finished
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"
    assert list(unbegun) == []


def test_an_error_in_the_turn_frees_the_session(tmp_path: Path) -> None:
    s = session()
    (tmp_path / "noise.wav").write_bytes(b"no sound at all")
    events = s.respond("aa", tmp_path / "noise.wav")
    with pytest.raises(AudioError, match="noise.wav"):
        next(events)
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


# --- cancelling


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


# --- closing, and who owns what


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
    """What `runtimes.load` gave out, newest last; its encoders know whether they were closed."""
    given: list[Components] = []

    def load(bundle: Bundle, **how: Any) -> Components:
        given.append(fake.components(SPEC, script(SPEC, 20)))
        return given[-1]

    monkeypatch.setattr(engines, "load", load)
    return given


def a_bundle() -> Bundle:
    part = SimpleNamespace(engine="onnxruntime", format="onnx", precision="int8")
    manifest = SimpleNamespace(spec=SPEC, components=dict.fromkeys(("encoder", "llm", "codec"), part), tokenizer=None)
    return Bundle(Path("bundle"), manifest)  # type: ignore[arg-type]


def closed(components: Components) -> bool:
    assert isinstance(components.encoder, fake.FakeEncoder)
    return components.encoder.closed


def test_sessions_of_a_bundle_share_what_is_loaded_alike(loads: list[Components]) -> None:
    bundle = a_bundle()
    first, second = Session.open(bundle, threads=2), Session.open(bundle, threads=2)
    other = Session.open(bundle, threads=1)
    assert first.components is second.components is not other.components
    assert Session.open(a_bundle(), threads=2).components is not first.components
    assert len(loads) == 3


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


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'; known are cpu, cuda"):
        Session.open("bundle", device="tpu")  # type: ignore[arg-type]


# --- sample rate and length limit


def heard(s: Session, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The samples that the front end gets."""
    from edgeomni import audio

    seen: list[np.ndarray] = []
    log_mel = audio.log_mel

    def noted(samples: np.ndarray, *rest: Any) -> Any:
        seen.append(samples)
        return log_mel(samples, *rest)

    monkeypatch.setattr(audio, "log_mel", noted)
    return seen


def test_samples_at_another_rate_are_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session()
    seen = heard(s, monkeypatch)
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32) * 0.3
    end = ended(s.respond("aa", tone, sample_rate=44100))
    ended(s.respond("aa", NOISE, sample_rate=16000))
    ended(s.respond("aa", NOISE))
    np.testing.assert_array_equal(seen[0], resample(tone, 44100, 16000))
    assert len(seen[0]) == 16000 and "load" in end.spans.records
    crossings = np.count_nonzero(np.diff(np.signbit(seen[0][1000:15000])))
    assert crossings == pytest.approx(2 * 440 * 14000 / 16000, abs=2), "the tone is still 440 Hz"
    np.testing.assert_array_equal(seen[1], NOISE)
    np.testing.assert_array_equal(seen[2], NOISE)


def test_a_sample_rate_beside_a_file_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "q.wav", NOISE, 16000)
    with pytest.raises(UsageError, match="q.wav, but a sound file states its own rate"):
        session().respond("aa", tmp_path / "q.wav", sample_rate=16000)


FRAME_S = 64 / 24000
"""One codec frame of the small spec: hop 16, coarsest stride 4."""


@pytest.mark.parametrize(("seconds", "frames"), [(FRAME_S, 1), (2.5 * FRAME_S, 2), (10 * FRAME_S, 10)])
def test_max_seconds_bounds_the_sound(seconds: float, frames: int) -> None:
    s = session(small_spec(context=200), 60, eoa=False)
    events = list(s.respond("aa", NOISE[:1600], max_seconds=seconds))
    samples = sum(len(e.samples) for e in events if isinstance(e, AudioChunk))
    end = ended(events)
    assert samples == frames * 64 and end.reason == "length" and end.tokens.shape[1] == frames + 7


def test_the_tighter_of_max_seconds_and_max_length_holds() -> None:
    s = session(small_spec(context=200), 60, eoa=False)
    prompt = 6 + 3
    for how, frames in (
        ({"max_seconds": 10 * FRAME_S, "max_length": prompt + 5}, 5),
        ({"max_seconds": 10 * FRAME_S, "max_length": prompt + 30}, 17),
        ({"max_seconds": 1000.0}, 200 - prompt),
        ({}, 200 - prompt),
    ):
        assert ended(s.respond("aa", NOISE[:1600], **how)).tokens.shape[1] == frames  # type: ignore[arg-type]


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
        for module in ("session", "turn", "generate", "spans"):
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
