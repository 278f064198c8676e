"""The loop itself, without a Session: what each engine call is given, in which order, and when it stops.

The layout has three audio streams (strides 2, 1; codebook 10) and 100 text ids: eot 92, pad_t 93; unshifted eoa 10,
pad_a 11, so that the three streams' pad_a are rows 111, 129 and 147 of the joint vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fakes import Clock, script, small_spec

from edgeomni import generate as loop
from edgeomni import prompts
from edgeomni.components import Components, Features, features_between
from edgeomni.errors import PromptError
from edgeomni.generate import Forced, Frame, Options, Samples, Stop
from edgeomni.runtimes import fake
from edgeomni.sampling import Sampling, choose
from edgeomni.spans import Spans
from edgeomni.spec import OmniSpec

SPEC = small_spec(strides=(2, 1), codebook=10, context=300)
EOA, PAD_A, EOT, PAD_T = 10, 11, 92, 93
PAD_ROWS = [111, 129, 147]


class Recorder(fake.FakeLanguageModel):
    """The scripted LLM, which also keeps its states and what `frame_ids` was given."""

    def __init__(self, spec: OmniSpec, frames: Sequence[Sequence[int]]) -> None:
        super().__init__(spec, frames)
        self.kept: list[fake.FakeState] = []
        self.chosen: list[tuple[int, int, list[float], Sampling]] = []

    def start(self, rows: int, max_frames: int) -> fake.FakeState:
        self.kept.append(super().start(rows, max_frames))
        return self.kept[-1]

    def frame_ids(self, hidden: Any, row: int, text_id: int, draws: Any, rule: Sampling) -> Any:
        self.chosen.append((row, text_id, list(draws), rule))
        return super().frame_ids(hidden, row, text_id, draws, rule)


class Turn:
    """One turn of `frames` scripted frames: its events, and the parts that answered."""

    def __init__(
        self,
        frames: Sequence[Sequence[int]],
        task: str = "aa",
        options: Options | None = None,
        *,
        spec: OmniSpec = SPEC,
        two_row: bool = True,
        llm: Recorder | None = None,
        cancelled: Callable[[], bool] | None = None,
        features: int = 4,
        on_event: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self.llm = llm or Recorder(spec, frames)
        self.codec, self.spans = fake.FakeCodec(spec), Spans()
        spoken = task in ("aa", "at", "asr")
        asked = {"features": features} if spoken else {"text_ids": [5] * features}
        self.prompt = prompts.build(spec, task, two_row=two_row, **asked)  # type: ignore[arg-type]
        given = [Features(1, np.zeros((features, spec.body.width), np.float32))] if spoken else []
        parts = Components(fake.FakeEncoder(spec), self.llm, self.codec)
        self.events = []
        listening = () if cancelled is None else (cancelled,)
        for event in loop.generate(
            parts, spec, task, self.prompt, given, options or Options(), self.spans, *listening
        ):
            self.events.append(event)
            on_event(event)
        self.frames = [e for e in self.events if isinstance(e, Frame)]
        self.text = [f.text for f in self.frames]
        stops = [e for e in self.events if isinstance(e, Stop)]
        assert stops == self.events[-1:], "one Stop, and it comes last"
        self.stop = stops[0]

    @property
    def samples(self) -> np.ndarray:
        return np.concatenate([e.samples for e in self.events if isinstance(e, Samples)] or [np.zeros(0)])


def plain(text: list[int], frames: int, eoa: bool = True) -> list[list[int]]:
    return script(SPEC, frames, text, eoa)


# --- what the LLM is fed


def test_each_frame_is_fed_what_the_last_one_chose() -> None:
    frames = [[1, 2, 3, 40], [4, 5, 6, 41], [7, 8, 9, EOT], [0, 1, 2, 50], [3, 4, 5, 51], [6, 7, EOA, 52]]
    state = Turn(frames).llm.kept[0]
    steps = [ids[:, :, 0].tolist() for ids in state.fed[2:]]  # after the prompt's shared part and its last position
    assert steps == [
        [[101, 120, 139, 40], [*PAD_ROWS, 40]],
        [[104, 123, 142, 41], [*PAD_ROWS, 41]],
        [[107, 126, 145, EOT]],  # its text has ended, so row 1 goes
        [[100, 119, 138, PAD_T]],
        [[103, 122, 141, PAD_T]],
    ]
    assert all(not given for given in state.features[2:]), "features belong to the prompt alone"


def test_one_row_is_fed_and_asked_alone() -> None:
    turn = Turn([[1, 2, 3, 40], [4, 5, 6, EOT], [7, 8, EOA, 1]], two_row=False)
    assert [ids[:, :, 0].tolist() for ids in turn.llm.kept[0].fed[1:]] == [
        [[101, 120, 139, 40]],
        [[104, 123, 142, EOT]],
    ]
    assert turn.llm.kept[0].max_rows == 1 and turn.text == [40, EOT]


def test_text_tasks_feed_pad_a() -> None:
    turn = Turn([[1, 2, 3, 40], [1, 2, 3, 41], [1, 2, 3, EOT]], task="at")
    assert [ids[:, :, 0].tolist() for ids in turn.llm.kept[0].fed[1:]] == [[[*PAD_ROWS, 40]], [[*PAD_ROWS, 41]]]
    assert turn.text == [40, 41] and turn.stop == Stop("eot", 0, turn.stop.busy_s)
    assert [f.audio.tolist() for f in turn.frames] == [[PAD_A] * 3] * 2
    assert turn.llm.chosen == [] and turn.codec.seeds == [], "nobody asked the audio heads or the codec"


def test_next_ids_written_out() -> None:
    one = loop.next_ids(SPEC.layout, np.array([0, 9, EOA]), 77, rows=1)
    assert one.tolist() == [[[100], [127], [146], [77]]] and one.dtype == np.int32
    two = loop.next_ids(SPEC.layout, np.array([0, 9, EOA]), 77, rows=2)
    assert two.tolist() == [[[100], [127], [146], [77]], [[111], [129], [147], [77]]]


# --- the prompt in pieces

P = loop.PREFILL_FRAMES


@pytest.mark.parametrize(
    ("length", "pieces"),
    [(1, [1]), (P - 1, [P - 1]), (P, [P]), (P + 1, [P, 1]), (2 * P, [P, P]), (2 * P + 5, [P, P, 5])],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_goes_in_by_pieces(length: int, pieces: list[int], rows: int) -> None:
    """With two rows all but the last position are shared; that one comes after them, in both rows."""
    whole = length + (rows == 2)
    ids = np.zeros((rows, 4, whole), np.int32) + np.array([[100], [118], [136], [0]], np.int32)
    ids[:, 3] = np.arange(whole) % 90
    ids[rows - 1, 0, -1] = 111
    llm = fake.FakeLanguageModel(SPEC, [[0, 0, 0, 0]])
    state = llm.start(rows, whole)
    hidden = loop.prefill(llm, ids, (), state)
    assert isinstance(hidden, fake.FakeHidden) and hidden.rows == rows
    assert [f.shape for f in state.fed[: len(pieces)]] == [(1, 4, n) for n in pieces]
    shared = np.concatenate(state.fed[: len(pieces)], axis=2)
    np.testing.assert_array_equal(shared, ids[:1, :, :length])
    assert len(state.fed) == len(pieces) + (rows == 2)
    if rows == 2:
        np.testing.assert_array_equal(state.fed[-1], ids[:, :, -1:])


@pytest.mark.parametrize(("start", "count"), [(1, 3), (1, P - 1), (1, P), (P, 1), (P - 1, 2), (3, 2 * P), (0, 2 * P + 5)])
@pytest.mark.parametrize("rows", [1, 2])
def test_features_reach_their_own_positions_across_pieces(start: int, count: int, rows: int) -> None:
    length = 2 * P + 5
    ids = np.zeros((rows, 4, length), np.int32) + np.array([[100], [118], [136], [0]], np.int32)
    values = np.repeat(np.arange(1, count + 1, dtype=np.float32)[:, None], SPEC.body.width, axis=1)
    llm = fake.FakeLanguageModel(SPEC, [[0, 0, 0, 0]])
    state = llm.start(rows, length)
    loop.prefill(llm, ids, [Features(start, values)], state)
    seen, position = np.zeros(length), 0
    for fed, segments in zip(state.fed, state.features, strict=True):
        for segment in segments:
            seen[position + segment.start : position + segment.stop] = segment.values[:, 0]
        position += fed.shape[2]
    expected = np.zeros(length)
    expected[start : start + count] = np.arange(1, count + 1)
    np.testing.assert_array_equal(seen, expected)


def test_features_between_its_edges() -> None:
    """Features 0, 1, 2 at positions 5, 6, 7, and one more at position 10."""
    segments = [Features(5, np.array([[0.0], [1.0], [2.0]])), Features(10, np.array([[3.0]]))]

    def cut(start: int, stop: int) -> list[tuple[int, list[float]]]:
        return [(s.start, s.values[:, 0].tolist()) for s in features_between(segments, start, stop)]

    assert cut(0, 20) == [(5, [0, 1, 2]), (10, [3])]
    assert cut(5, 8) == [(0, [0, 1, 2])]
    assert cut(6, 7) == [(0, [1])]
    assert cut(4, 6) == [(1, [0])]
    assert cut(7, 11) == [(0, [2]), (3, [3])]
    assert cut(0, 5) == cut(8, 10) == cut(11, 30) == cut(6, 6) == []


def test_cancel_while_the_prompt_goes_in() -> None:
    """`cancelled` is asked before each piece: two pieces went in, the third and the answer are left out."""
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    turn = Turn(plain([1], 9), cancelled=cancelled, features=3 * P)
    assert turn.events == [Stop("cancelled", 0, 0.0)]
    assert [f.shape[2] for f in turn.llm.kept[0].fed] == [P, P] and len(asked) == 3
    assert turn.codec.pushes == []


# --- stopping


def test_only_the_last_stream_s_eoa_ends_the_answer() -> None:
    frames = [[1, 2, 3, 40], [EOA, 5, 6, 41], [7, EOA, 9, 42], [7, 8, EOA, 43], [1, 1, 1, 44]]
    turn = Turn(frames)
    assert turn.stop.reason == "eoa"
    assert [f.audio.tolist() for f in turn.frames] == [[1, 2, 3], [EOA, 5, 6], [7, EOA, 9]]


def test_the_frame_with_eoa_is_not_emitted_even_where_its_text_ends_too() -> None:
    turn = Turn([[1, 2, 3, 40], [4, 5, 6, 41], [7, 8, EOA, EOT]])
    assert turn.stop.reason == "eoa" and turn.text == [40, 41]


def test_the_prefill_s_frame_is_tested_by_no_rule() -> None:
    turn = Turn([[1, 2, EOA, EOT], [4, 5, 6, 41], [7, 8, 9, EOT], [1, 1, 1, 44], [1, 1, EOA, 44]])
    assert turn.text == [EOT, 41, EOT, PAD_T] and turn.frames[0].audio.tolist() == [1, 2, EOA]
    written = Turn([[1, 2, 3, EOT], [4, 5, 6, 41], [7, 8, 9, EOT]], task="tt")
    assert written.text == [EOT, 41] and written.stop.reason == "eot"


def test_eot_does_not_end_speech_and_eoa_does_not_end_text() -> None:
    spoken = Turn(plain([1], 30))
    assert spoken.stop.reason == "eoa" and spoken.text == [1, EOT] + [PAD_T] * 28
    written = Turn([[1, 2, EOA, 40], [1, 2, EOA, 41], [1, 2, 3, EOT]], task="tt")
    assert written.stop.reason == "eot" and written.text == [40, 41]


@pytest.mark.parametrize(
    ("most", "frames"), [(8, 1), (9, 2), (20, 13), (299, 292), (300, 293), (301, 293), (None, 293)]
)
def test_max_length_counts_prompt_and_answer_and_never_exceeds_the_context(most: int | None, frames: int) -> None:
    """The prompt takes 4 + 3 frames, and the context has 300."""
    turn = Turn(plain([1], 400, eoa=False), options=Options(max_length=most))
    assert (turn.stop.reason, len(turn.frames)) == ("length", frames)
    assert turn.llm.kept[0].max_frames == min(most or 300, 300)


def test_a_prompt_that_fills_everything_is_refused() -> None:
    assert len(Turn(plain([1], 400), options=Options(max_length=8)).frames) == 1
    with pytest.raises(PromptError, match=r"prompt takes 7 frames, and 7 are allowed in all \(context 300\)"):
        Turn(plain([1], 400), options=Options(max_length=7))
    with pytest.raises(PromptError, match="prompt takes 301 frames, and 300 are allowed"):
        Turn(plain([1], 400), features=298)


def test_an_answer_cut_by_its_length_still_gives_its_audio() -> None:
    turn = Turn(plain([1], 400, eoa=False), options=Options(max_length=7 + 10))
    assert len(turn.samples) == (10 - 3) * SPEC.codec.frame_samples and turn.codec.lasts[-1] is True


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_cancelled_turn_flushes_no_audio(after: int) -> None:
    """Cancelled while frame `after` was listened to: no frame and no sample comes any more."""
    heard: list[Frame] = []
    turn = Turn(
        plain([1], 30),
        cancelled=lambda: len(heard) == after,
        on_event=lambda e: heard.append(e) if isinstance(e, Frame) else None,
    )
    assert turn.stop.reason == "cancelled" and len(turn.frames) == after
    assert True not in turn.codec.lasts and sum(turn.codec.pushes) <= max(0, after - 3)
    assert isinstance(turn.events[-2], Frame if after < 6 else Frame | Samples)


def test_silent_frames_are_counted_in_the_stop() -> None:
    frames = plain([1], 12)
    frames[4][0] = EOA  # stream 0 of LLM frame 4 is codec frame 3
    frames[9][2] = PAD_A  # stream 2 of LLM frame 9 is codec frame 6
    turn = Turn(frames)
    by_frame = turn.samples.reshape(-1, SPEC.codec.frame_samples)
    assert turn.stop.silent_frames == 2
    assert [i for i, wave in enumerate(by_frame) if not wave.any()] == [3, 6]


# --- the delay pattern


@pytest.mark.parametrize("strides", [(1,), (1, 1, 1), (2, 1), (4, 2, 1), (8, 4, 2, 1)])
def test_codec_frames_are_read_along_the_diagonal(strides: tuple[int, ...]) -> None:
    """Stream k of codec frame f stands in LLM frame f + k + 1, whatever the layout."""
    spec = small_spec(strides=strides, codebook=997, context=100)
    k = spec.layout.streams
    frames = [[31 * i + s for s in range(k)] + [1] for i in range(k + 6)]
    frames.append([0] * (k - 1) + [spec.layout.eoa, 1])
    turn = Turn(frames, spec=spec)
    expected = [[31 * (f + s + 1) + s for s in range(k)] for f in range(6)]
    levels = spec.codec.level_of_stream
    for level, pushed in enumerate(turn.codec.codes):
        ids = [[frame[s] for s in range(k) if levels[s] == level] for frame in expected]
        np.testing.assert_array_equal(np.concatenate(pushed), np.concatenate(ids))


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
    turn = Turn([[1, 2, 3, t] for t in (EOT, 41, EOT, 43, 44, 45, 46)], options=Options(max_length=7 + 6, forced=Forced(text_end=end)))
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
