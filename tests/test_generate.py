"""The loop against scripted logits: delay pattern, stopping rules, rows, cancel, silence."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from fakes import script, small_spec

from edgeomni import AudioChunk, Session, TextDelta, TurnEnd
from edgeomni.errors import AudioError, EngineError, PromptError, UsageError
from edgeomni.runtimes import fake
from edgeomni.sampling import Sampling
from edgeomni.spec import OmniSpec
from edgeomni.tokens import undelay

NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1


def session(spec: OmniSpec, frames: list[list[int]], **codec: int) -> Session:
    return Session(fake.components(spec, frames, **codec), spec, None)


def answer(s: Session, task: str = "aa", **kwargs: object) -> tuple[str, np.ndarray, TurnEnd]:
    question = {"audio": NOISE[:1600]} if task[0] == "a" else {"text": "x"}
    events = list(s.respond(task, **{**question, **kwargs}))  # type: ignore[arg-type]
    samples = [e.samples for e in events if isinstance(e, AudioChunk)]
    end = events[-1]
    assert isinstance(end, TurnEnd)
    text = "".join(e.text for e in events if isinstance(e, TextDelta))
    return text, np.concatenate(samples) if samples else np.zeros(0, np.float32), end


@pytest.mark.parametrize("two_row", [True, False])
def test_audio_follows_the_delay_pattern(two_row: bool) -> None:
    spec = small_spec()
    frames = script(spec, 20)
    text, samples, end = answer(session(spec, frames), two_row=two_row)
    assert (end.reason, text, end.text) == ("eoa", "<1><2><3>", "<1><2><3>")
    assert end.tokens.shape == (8, 20), "the frame with eoa is not emitted"
    np.testing.assert_array_equal(end.tokens[:-1], np.array(frames[:20]).T[:-1])
    expected = undelay(np.array(frames[:20]).T[:-1]).mean(1)  # the fake codec's wave is the mean of each frame's ids
    np.testing.assert_allclose(samples.reshape(-1, spec.codec.frame_samples)[:, 0], expected, rtol=1e-6)
    assert end.timings["audio"] == len(samples) / spec.codec.sample_rate


def test_text_is_padded_after_its_end_and_row_one_goes() -> None:
    spec = small_spec()
    s = session(spec, script(spec, 12))
    llm = s.components.llm
    assert isinstance(llm, fake.FakeLanguageModel)
    states: list[fake.FakeState] = []
    start = llm.start

    def noted(rows: int, max_frames: int) -> fake.FakeState:
        states.append(start(rows, max_frames))
        return states[-1]

    llm.start = noted  # type: ignore[method-assign]
    _, _, end = answer(s)
    layout = spec.layout
    assert end.tokens[-1].tolist() == [1, 2, 3, layout.eot] + [layout.pad_t] * 8
    rows = [f.shape[0] for f in states[0].fed]
    # one-row prefix, then two rows from the last prompt position until eot was sampled, then one
    assert rows == [1, 2, 2, 2, 2] + [1] * 9
    assert llm.text_heads == 4 and llm.audio_heads == 13
    second = states[0].fed[2]
    np.testing.assert_array_equal(second[1, :-1, 0], [layout.shift(k) + layout.pad_a for k in range(layout.streams)])
    assert second[0, -1, 0] == second[1, -1, 0] == 1, "both rows are fed row 1's text"
    states.clear()
    assert not llm.states, "the KV cache was given back"


@pytest.mark.parametrize("task", ["asr", "at", "tt"])
def test_text_tasks_stop_before_eot(task: str) -> None:
    spec = small_spec()
    s = session(spec, script(spec, 20))
    s.tokenizer.encode = lambda text: [5, 6]  # type: ignore[method-assign]
    _, samples, end = answer(s, task)
    assert end.reason == "eot" and end.tokens[-1].tolist() == [1, 2, 3] and not len(samples)
    assert isinstance(s.components.llm, fake.FakeLanguageModel) and s.components.llm.audio_heads == 0


def test_the_first_frame_is_never_tested() -> None:
    spec = small_spec()
    frames = [[0, 0, 0, 0, 0, 0, spec.layout.eoa, spec.layout.eot], *script(spec, 9)]
    _, _, end = answer(session(spec, frames))
    assert end.reason == "eoa" and end.tokens.shape[1] == 10
    assert end.tokens[-1, 4] == spec.layout.eot, "text went on after the untested first frame"


def test_max_length_counts_the_prompt() -> None:
    spec = small_spec()
    s = session(spec, script(spec, 50, eoa=False))
    prompt = 6 + 3  # 100 ms are 6 features
    _, _, end = answer(s, max_length=prompt + 11)
    assert end.reason == "length" and end.tokens.shape[1] == 11
    with pytest.raises(PromptError, match="prompt takes 9 frames"):
        answer(s, max_length=prompt)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_length": 0}, "max_length must .* above 0, not 0"),
        ({"max_length": -3}, "max_length must .* not -3"),
        ({"max_length": 2.5}, "max_length must .* not 2.5"),
        ({"max_length": True}, "max_length must .* not True"),
        ({"forced_text_end": 0}, "text_end must .* not 0"),
        ({"forced_codes": np.zeros((0, 7), np.int64)}, r"\[frames, 7\], not \(0, 7\)"),
        ({"forced_codes": np.zeros((3, 6), np.int64)}, r"\[frames, 7\], not \(3, 6\)"),
        ({"forced_codes": np.zeros(7, np.int64)}, r"\[frames, 7\], not \(7,\)"),
        ({"noise_seed": -1}, "noise_seed must .* not -1"),
    ],
)
def test_lengths_and_seeds_that_make_no_sense(wrong: dict[str, object], said: str) -> None:
    spec = small_spec()
    s = session(spec, script(spec, 20))
    with pytest.raises(UsageError, match=said):
        answer(s, **wrong)  # type: ignore[arg-type]
    assert answer(s, forced_text_end=np.int64(1))[2].reason == "eoa", "and the session goes on"


def test_samples_that_were_not_scaled_are_refused() -> None:
    spec = small_spec()
    s = session(spec, script(spec, 20))
    with pytest.raises(AudioError, match="divide int16 by 32768"):
        answer(s, audio=(NOISE[:1600] * 32767).astype(np.int16))
    doubles = answer(s, audio=NOISE[:1600].astype(np.float64))
    assert doubles[2].reason == "eoa"


@pytest.mark.parametrize("frames", [1, 6, 7])
def test_answer_shorter_than_the_delay_is_empty_audio(frames: int) -> None:
    spec = small_spec()
    _, samples, end = answer(session(spec, script(spec, frames)))
    assert end.reason == "eoa" and len(samples) == 0 and end.timings["audio"] == 0


def test_cancel_stops_within_one_frame_and_leaves_the_session_usable() -> None:
    spec = small_spec()
    s = session(spec, script(spec, 30))
    events = s.respond("aa", audio=NOISE[:1600])
    next(events)
    s.cancel()
    rest = list(events)
    assert isinstance(rest[-1], TurnEnd) and rest[-1].reason == "cancelled" and rest[-1].tokens.shape[1] == 1
    assert answer(s)[2].reason == "eoa"


def test_a_listener_that_walks_away_leaves_the_session_usable() -> None:
    spec = small_spec()
    s = session(spec, script(spec, 30))
    events = s.respond("aa", audio=NOISE[:1600])
    next(events)
    with pytest.raises(UsageError, match="answering already"):
        next(s.respond("aa", audio=NOISE[:1600]))
    events.close()  # type: ignore[attr-defined]
    assert isinstance(s.components.llm, fake.FakeLanguageModel) and not s.components.llm.states
    assert answer(s)[2].reason == "eoa"


def test_ids_that_are_no_codec_entries_become_silence(caplog: pytest.LogCaptureFixture) -> None:
    spec = small_spec()
    frames = script(spec, 20)
    frames[12][2] = spec.layout.answer_a  # stream 2 of LLM frame 12 belongs to codec frame 9
    with caplog.at_level(logging.WARNING, "edgeomni"):
        _, samples, end = answer(session(spec, frames))
    by_frame = samples.reshape(-1, spec.codec.frame_samples)
    assert end.silent_frames == 1 and not by_frame[9].any() and by_frame[8].any() and by_frame[10].any()
    assert len(caplog.records) == 1
    with pytest.raises(EngineError, match="codec frame 9"):
        answer(session(spec, frames), strict=True)


def test_first_push_is_small_then_grows() -> None:
    spec = small_spec()
    s = session(spec, script(spec, 30))
    answer(s)
    assert isinstance(s.components.codec, fake.FakeCodec)
    assert s.components.codec.pushes == [3, 1, 2, 4, 4, 4, 4, 1]
    windowed = session(spec, script(spec, 40), first_push=5, push_multiple=4)
    answer(windowed)
    assert isinstance(windowed.components.codec, fake.FakeCodec)
    assert windowed.components.codec.pushes == [8, 4, 8, 13]


def test_other_layouts_run_the_same_loop() -> None:
    spec = small_spec(strides=(8, 4, 2, 1))
    _, samples, end = answer(session(spec, script(spec, 30)))
    assert end.tokens.shape == (16, 30) and len(samples) == 15 * spec.codec.frame_samples


def test_forced_codes_are_what_is_decoded() -> None:
    spec = small_spec()
    forced = np.random.default_rng(1).integers(0, 32, (9, 7))
    _, samples, end = answer(session(spec, script(spec, 60, eoa=False)), forced_codes=forced, forced_text_end=5)
    np.testing.assert_allclose(samples.reshape(9, -1)[:, 0], forced.mean(1), rtol=1e-6)
    assert end.reason == "eoa" and end.tokens.shape[1] == 16
    assert end.tokens[-1, 5] == spec.layout.eot and spec.layout.eot not in end.tokens[-1, :5]


def test_a_seed_means_the_same_answer() -> None:
    spec = small_spec()
    hot = Sampling(temperature=50.0, top_k=None, seed=3)
    runs = [answer(session(spec, script(spec, 30)), sampling=hot)[2].tokens for _ in range(2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    other = answer(session(spec, script(spec, 30)), sampling=Sampling(temperature=50.0, top_k=None, seed=4))[2].tokens
    assert other.shape != runs[0].shape or (other != runs[0]).any()


def test_long_audio_is_refused_or_split() -> None:
    spec = small_spec(context=4000)
    s = session(spec, script(spec, 10))
    long = np.tile(NOISE, 32)
    with pytest.raises(AudioError, match="32.0 s.*30 s.*--long split"):
        answer(s, audio=long)
    end = answer(s, audio=long, long_audio="split")[2]
    assert len(end.spans.records["encoder"]) == 2
    assert answer(s, audio=NOISE, encoder_window="auto")[2].reason == "eoa"
    with pytest.raises(UsageError, match="encoder window"):
        answer(s, audio=NOISE, encoder_window=31)


def test_what_the_checkpoint_was_not_trained_for_is_refused_by_name() -> None:
    spec = small_spec(tasks=("asr",))
    s = session(spec, script(spec, 10))
    with pytest.raises(PromptError, match="not trained for task 'aa'"):
        answer(s)
    s.tokenizer.encode = lambda text: [5, 6]  # type: ignore[method-assign]
    with pytest.raises(PromptError, match="1 turn.* of history.* trained with 0"):
        answer(s, "asr", history=[("hello", "hi")])
    with pytest.raises(PromptError, match="needs spoken audio"):
        answer(s, "asr", audio=None)
