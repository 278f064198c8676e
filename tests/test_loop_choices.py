"""The loop without a Session: who is asked what, in which order numbers are drawn, what is forced, and busy time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import Clock
from turns import EOA, EOT, PAD_A, PAD_T, SPEC, Recorder, Turn, plain

from edgeomni.generate import Forced, Options
from edgeomni.runtimes import fake
from edgeomni.sampling import Sampling, choose

# --- sampling


def test_the_audio_heads_get_row_0_the_frame_s_own_text_and_the_rule() -> None:
    rule = Sampling()
    turn = Turn([[1, 2, 3, 40], [4, 5, 6, 41], [7, 8, 9, EOT], [1, 1, 1, 9], [1, 1, EOA, 9]], options=Options(rule))
    assert [(row, text) for row, text, _, _ in turn.llm.chosen] == [(0, t) for t in (40, 41, EOT, PAD_T, PAD_T)]
    assert all(given is rule for *_, given in turn.llm.chosen)


def hot(seed: int) -> Sampling:
    return Sampling(temperature=100.0, top_k=None, seed=seed)


def one_hot(index: int, size: int) -> np.ndarray:
    logits = np.zeros(size, np.float32)
    logits[index] = 10
    return logits


def test_a_seed_s_numbers_go_to_the_audio_streams_first_then_to_the_text() -> None:
    """While text runs a frame draws three numbers and one, afterwards three; a second generator counts along."""
    frames = [[1, 2, 3, t] for t in (40, 41, 42, 43, 44, 45)]
    turn = Turn(frames, options=Options(hot(11), max_length=7 + 40, forced=Forced(text_end=3)))
    rng = np.random.default_rng(11)
    text_logits = [one_hot(f[-1], 100) for f in frames] + [one_hot(45, 100)] * 40
    for i, (_, text, draws, _) in enumerate(turn.llm.chosen):
        assert draws == rng.random(3).tolist()
        if i <= 3:
            assert text == choose(text_logits[i], rng.random(), hot(11))
    assert len(turn.llm.chosen) > 5 and turn.text[3:5] == [EOT, PAD_T]


def test_text_tasks_draw_for_the_text_only() -> None:
    turn = Turn([[1, 2, 3, 40]] * 6, task="tt", options=Options(hot(11), max_length=7 + 5))
    rng = np.random.default_rng(11)
    drawn = [choose(one_hot(40, 100), rng.random(), hot(11)) for _ in range(5)]
    assert EOT not in drawn and turn.text == drawn


class Undecided(Recorder):
    """Always the same three good texts: id 5 a little before 6, 6 a little before 7."""

    def text_logits(self, hidden: Any, row: int) -> np.ndarray:
        super().text_logits(hidden, row)
        logits = np.full(100, -1.0, np.float32)
        logits[[5, 6, 7]] = [2.0, 1.9, 1.8]
        return logits


@pytest.mark.parametrize("task", ["tt", "aa"])
def test_the_repetition_penalty_counts_the_answer_s_own_text(task: str) -> None:
    """2.0, 1.9, 1.8 divided by 1.5 once seen: each comes once, then the first one again. The prompt does not count."""
    options = Options(Sampling(greedy=True, repetition_penalty=1.5), max_length=7 + 6)
    assert Turn([], task, options, llm=Undecided(SPEC, [[1, 2, 3, 5]])).text == [5, 6, 7, 5, 5, 5]
    without = Options(Sampling(greedy=True), max_length=7 + 6)
    assert Turn([], task, without, llm=Undecided(SPEC, [[1, 2, 3, 5]])).text == [5] * 6


def test_options_reach_the_codec() -> None:
    assert Turn(plain([1], 9), options=Options(noise_seed=3)).codec.seeds == [3]
    assert Turn(plain([1], 9)).codec.seeds == [None]


# --- what a benchmark forces


def test_forced_frames_replace_the_model_s_own_and_its_eoa() -> None:
    codes = np.array([[1, 2, 3], [4, 5, 6]])
    own = [[9, 9, EOA, 40]] * 20  # the model itself would end at once
    turn = Turn(own, options=Options(forced=Forced(codes)))
    assert [f.audio.tolist() for f in turn.frames] == [
        [PAD_A, PAD_A, PAD_A],
        [1, PAD_A, PAD_A],
        [4, 2, PAD_A],
        [PAD_A, 5, 3],
        [PAD_A, PAD_A, 6],
    ]
    assert [np.concatenate(level).tolist() for level in turn.codec.codes] == [[1, 4], [2, 3, 5, 6]]
    assert turn.stop.reason == "eoa" and turn.stop.silent_frames == 0
    assert turn.text == [40] * 5, "the text is the model's own"


@pytest.mark.parametrize("end", [1, 3, 4])
def test_a_forced_end_of_text_is_where_it_was_forced(end: int) -> None:
    """The model's own eot, at frames 0 and 2, becomes id 0 before that."""
    turn = Turn(
        [[1, 2, 3, t] for t in (EOT, 41, EOT, 43, 44, 45, 46)],
        options=Options(max_length=7 + 6, forced=Forced(text_end=end)),
    )
    free = [0, 41, 0, 43, 44, 45]
    assert turn.text == [*free[:end], EOT, *[PAD_T] * (5 - end)]


# --- time


def test_busy_time_is_the_loop_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward takes 4 s, a text head 1 s, the audio heads 2 s, the codec 8 s; the listener takes 1000 s each time.

    9 frames and the one with eoa: the body 9 times, text heads until eot in frame 1, so twice, audio heads 10 times.
    6 codec frames are pushed as 3, 1, 2 and the flushed tail.
    """
    clock = Clock()
    clock.install(monkeypatch)
    llm = Recorder(SPEC, plain([1], 9))
    for name, seconds in (("forward", 4), ("text_logits", 1), ("audio_logits", 2)):
        clock.slow(monkeypatch, llm, name, seconds)
    clock.slow(monkeypatch, fake.FakeCodec, "decode", 8)
    turn = Turn([], llm=llm, on_event=lambda _: clock.advance(1000))
    assert turn.codec.pushes == [3, 1, 2, 0]
    assert turn.stop.busy_s == 9 * 4 + 2 * 1 + 10 * 2 + 4 * 8
    totals = {name: turn.spans.total(name) for name in turn.spans.records}
    assert totals == {
        "prefill": 2 * 4,  # the shared part, and the last position of both rows
        "frame": 9 * 4 + 2 * 1 + 10 * 2,
        "frame.body": 9 * 4,
        "frame.text_head": 2,
        "frame.sampling": 0,
        "frame.audio_head": 20,
        "codec": 32,
    }
