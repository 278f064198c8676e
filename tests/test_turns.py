"""What a Session is asked on scripted components: checks at the call, freeing, sample rates and length limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fakes import ended, small_spec
from fakes import scripted_session as session

from edgeomni import AudioChunk, Session
from edgeomni.audio import resample
from edgeomni.errors import AudioError, PromptError, UsageError
from edgeomni.runtimes import fake

NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
SPEC = small_spec()


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


def test_a_file_that_is_too_long_is_refused_when_it_was_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.tile(NOISE, 31), 16000)
    s = session(small_spec(context=4000))
    with pytest.raises(AudioError, match="lasts 31.0 s.*window is 30 s"):
        next(s.respond("aa", tmp_path / "long.wav"))
    assert ended(s.respond("aa", tmp_path / "long.wav", long_audio="split")).reason == "eoa"


def test_the_smallest_numbers_that_make_sense_are_taken() -> None:
    assert ended(session().respond("aa", NOISE[:1600], noise_seed=0)).reason == "eoa"
    with pytest.raises(PromptError, match="prompt takes 9 frames"):
        next(session().respond("aa", NOISE[:1600], max_length=1))


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
