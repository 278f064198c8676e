"""The loop with its codec beside its LLM: the same samples, in chunks as before; threads; errors, cancels, closing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fakes import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from overlapped import AFTER_TEXT, ON, Codec, Door, Llm, Schedule, Waits, no_thread_is_left, parts, until
from turns import EOA, SPEC, Turn, plain

from edgeomni import generate as loop
from edgeomni import overlap, prompts
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.generate import Frame, Options, Samples, Stop
from edgeomni.interrupt import Interrupt
from edgeomni.overlap import Overlap, Player, SharedThreads
from edgeomni.spans import Spans
from edgeomni.streaming import GROWTH, AudioStream

K = SPEC.layout.streams


def chunks(turn: Turn) -> list[list[float]]:
    return [e.samples.tolist() for e in turn.events if isinstance(e, Samples)]


def frames(turn: Turn) -> list[list[int]]:
    return [[*f.audio.tolist(), f.text] for f in turn.frames]


# --- the same answer


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 40),
    text=st.integers(0, 30),
    delays=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    first=st.integers(1, 5),
    multiple=st.integers(1, 3),
    mode=st.sampled_from([ON, AFTER_TEXT]),
    two_row=st.booleans(),
    eoa=st.booleans(),
    spoilt=st.sets(st.integers(0, 39), max_size=6),
)
def test_any_schedule_gives_the_sequential_answer(
    length: int,
    text: int,
    delays: list[int],
    first: int,
    multiple: int,
    mode: Overlap,
    two_row: bool,
    eoa: bool,
    spoilt: set[int],
) -> None:
    answer = [[PAD if i in spoilt else id_ for id_ in f[:1]] + f[1:] for i, f in enumerate(plain([3] * text, length))]
    answer = answer[: length + eoa]
    how: dict[str, Any] = {"two_row": two_row}
    longest = prompts.build(SPEC, "aa", features=4, two_row=two_row).length + length
    sequential = Turn(
        answer, options=Options(max_length=longest), codec=Codec(first_push=first, push_multiple=multiple), **how
    )
    with no_thread_is_left():
        schedule = Schedule(answer, delays, first_push=first, push_multiple=multiple)
        beside = Turn(
            answer,
            options=Options(max_length=longest, overlap=mode),
            codec=schedule.codec,
            llm=schedule.llm,
            spans=schedule.spans,
            **how,
        )
    assert frames(beside) == frames(sequential) and chunks(beside) == chunks(sequential)
    assert (beside.stop.reason, beside.stop.silent_frames) == (sequential.stop.reason, sequential.stop.silent_frames)
    assert beside.codec.pushes == sequential.codec.pushes and beside.codec.lasts == sequential.codec.lasts
    assert_no_chunk_is_early_or_late(sequential, beside)


PAD = 11
"""No codec entry: the codec frame that holds it becomes silence."""


def assert_no_chunk_is_early_or_late(sequential: Turn, beside: Turn) -> None:
    """The first chunk comes right after its frame; others not before theirs, nor after the next chunk's frame."""
    due, came = frames_before_chunks(sequential), frames_before_chunks(beside)
    assert came[:1] == due[:1]
    for i, at in enumerate(came[1:], 1):
        assert due[i] <= at <= (due[i + 1] if i + 1 < len(due) else len(beside.frames))


def frames_before_chunks(turn: Turn) -> list[int]:
    count, out = 0, []
    for event in turn.events:
        count += isinstance(event, Frame)
        if isinstance(event, Samples):
            out.append(count)
    return out


def test_pushes_go_beside_but_for_the_first_and_the_last() -> None:
    answer = plain([3] * 4, 24)
    codec = Codec()
    turn = Turn(answer, options=Options(overlap=ON), codec=codec)
    assert codec.pushes == [3, 1, 2, 4, 4, 4, 3] and codec.lasts[-1]
    assert [aside for aside, _ in codec.given_threads] == [False, *[True] * (len(codec.pushes) - 2), False]
    assert len(turn.spans.records["codec"]) == len(codec.pushes)
    assert len(turn.spans.records["codec.wait"]) == len(codec.pushes) - 2


@pytest.mark.parametrize(("two_row", "first_aside"), [(True, 5), (False, 1)])
def test_after_text_waits_for_the_second_row_to_go(two_row: bool, first_aside: int) -> None:
    """LLM frame 3 + n completes codec frame n; pushes end at frames 5, 6, 8, 12, 16, 20; text ends with frame 18."""
    codec = Codec()
    Turn(plain([3] * 18, 30), options=Options(overlap=AFTER_TEXT), codec=codec, two_row=two_row)
    assert [aside for aside, _ in codec.given_threads].index(True) == first_aside
    assert not codec.given_threads[-1][0] and all(aside for aside, _ in codec.given_threads[first_aside:-1])


def test_off_uses_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "ThreadPoolExecutor", None)
    turn = Turn(plain([3] * 4, 24), options=Options(overlap=Overlap("off", 4)), codec=(codec := Codec()))
    assert not codec.aside and set(codec.given_threads) == {(False, 4)} and "codec.wait" not in turn.spans.records


@pytest.mark.parametrize("when", ["interpreter ends", "no more threads"])
def test_where_no_thread_can_be_had_the_codec_decodes_here(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise RuntimeError("can't start new thread")

    if when == "no more threads":
        monkeypatch.setattr(threading.Thread, "start", refused)
    else:
        monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    answer = plain([3] * 4, 24)
    turn = Turn(answer, options=Options(overlap=ON), codec=(codec := Codec()))
    monkeypatch.undo()
    assert chunks(turn) == chunks(Turn(answer)) and not codec.aside
    assert {threads for _, threads in codec.given_threads} == {4}


# --- threads


def stepping(codec: Codec, llm: Llm, mode: Overlap = ON, **options: Any) -> tuple[Any, Interrupt]:
    """The loop over a spoken question, to be stepped through, and what stops it."""
    prompt = prompts.build(SPEC, "aa", features=4, two_row=True)
    given = [Features(1, np.zeros((4, SPEC.body.width), np.float32))]
    interrupt = Interrupt()
    components = parts([], codec, llm)
    spans = options.pop("spans", Spans())
    events = loop.generate(components, SPEC, "aa", prompt, given, Options(overlap=mode, **options), spans, interrupt)
    return events, interrupt


def until_push(events: Any, door: Door) -> list[Any]:
    """Steps until a push is at the door; the events until then."""
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, Frame) and sum(isinstance(e, Frame) for e in seen) > K + 3:
            break
    assert door.reached.wait(20)
    return seen


def test_llm_and_codec_share_the_threads_while_both_compute() -> None:
    """Push 2 of 1 frame begins beside LLM frame 6 (of index 0 on), and ends when frame 7 was made."""
    door = Door()
    codec, llm = Codec(beside=lambda push: door.pass_() if push == 0 else None), Llm(plain([3] * 2, 12))
    events, _ = stepping(codec, llm)
    until_push(events, door)
    made = len(llm.forwards)
    next(events)
    assert llm.forwards[:made] == [4] * made and llm.forwards[made:] == [2], "half of the four for each"
    assert codec.given_threads == [(False, 4), (True, 2)]
    door.open()
    rest = list(events)
    assert isinstance(rest[-1], Stop) and llm.threads == codec.threads == 4
    assert codec.given_threads[-1] == (False, 4), "the last push has them all"


def test_the_llm_has_all_threads_again_as_soon_as_the_codec_is_done() -> None:
    codec, llm = Codec(), Llm([])
    player = Player(AudioStream(codec, SPEC.codec, Spans()), SharedThreads(parts([], codec, llm), 4), Spans())
    door = Door()
    codec.beside = door.pass_
    frame = np.zeros(K, np.int64)
    for _ in range(4):
        player.add(frame, beside=True)
    player.share_threads()
    assert llm.threads == 2
    door.open()
    until(lambda: player.worked_until < float("inf"))
    (chunk,) = player.wait()
    player.share_threads()
    assert llm.threads == 4 and len(chunk)
    player.close()


@pytest.mark.parametrize(("threads", "llm_has", "codec_has"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 2, 2), (7, 4, 3)])
def test_how_threads_are_shared(threads: int, llm_has: int, codec_has: int) -> None:
    codec, llm = Codec(), Llm([])
    shared = SharedThreads(parts([], codec, llm), threads)
    shared.share(True)
    assert (llm.threads, codec.threads) == (llm_has, codec_has)
    shared.share(False)
    assert llm.threads == codec.threads == threads
    seen: list[int] = []
    llm.set_threads = codec.set_threads = seen.append  # type: ignore[method-assign, assignment]
    shared.prepare()
    assert seen == [llm_has, codec_has, threads, threads]


def test_parts_that_cannot_change_their_threads_are_left_alone() -> None:
    from edgeomni.runtimes import fake

    shared = SharedThreads(fake.components(SPEC, []), 4)
    shared.prepare()
    shared.share(True)


# --- errors, cancels, closing


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_of_the_codec_is_raised_in_the_caller(at: int) -> None:
    cause, error = KeyError("inner"), EngineError("the codec failed")
    error.__cause__ = cause

    def fail(push: int) -> None:
        if push == at:
            raise error

    codec, seen = Codec(beside=fail), []
    with no_thread_is_left():
        events, _ = stepping(codec, Llm(plain([3] * 2, 40)))
        with pytest.raises(EngineError) as caught:
            for event in events:
                seen.append(event)
    assert caught.value is error and caught.value.__cause__ is cause
    assert sum(isinstance(e, Samples) for e in seen) == 1 + at, "what was decoded before it was handed out"
    assert codec.aside == at + 1


def test_an_error_of_the_llm_comes_after_the_sound_before_it() -> None:
    """It comes while the chunk of frame 12 is decoded: a sequential answer has handed that out before."""

    def fail(number: int) -> None:
        if number == 15:
            raise EngineError("the LLM failed")

    door, seen, waits = Door(), [], list[int]()

    def waiting() -> None:
        waits.append(len(llm.forwards))
        if len(waits) == 3:
            door.open()

    codec = Codec(beside=lambda push: door.pass_() if push == 2 else None)
    llm = Llm(plain([3] * 2, 40), before=fail)
    with no_thread_is_left():
        events, _ = stepping(codec, llm, spans=Waits(waiting))
        with pytest.raises(EngineError, match="the LLM failed"):
            for event in events:
                seen.append(event)
    sequential = []
    events, _ = stepping(Codec(), Llm(plain([3] * 2, 40), before=fail), Overlap())
    with pytest.raises(EngineError, match="the LLM failed"):
        for event in events:
            sequential.append(event)
    assert [e.samples.tolist() for e in seen if isinstance(e, Samples)] == [
        e.samples.tolist() for e in sequential if isinstance(e, Samples)
    ]
    assert len(seen) == len(sequential)


def test_a_strict_answer_ends_where_a_sequential_one_does() -> None:
    answer = plain([3] * 2, 30)
    answer[15][0] = EOA  # stream 0 of codec frame 14, which LLM frame 17 completes, behind the push of frame 16

    def heard(mode: Overlap) -> list[list[float]]:
        events, _ = stepping(Codec(), Llm(answer), mode, strict=True)
        out = []
        with pytest.raises(EngineError, match="codec frame 14 holds ids"):
            for event in events:
                if isinstance(event, Samples):
                    out.append(event.samples.tolist())
        return out

    with no_thread_is_left():
        assert heard(ON) == heard(Overlap()) != []


def test_an_error_of_a_push_goes_before_one_that_comes_later() -> None:
    """The codec fails on the chunk of frame 16 while frame 17 turns out to hold what strict refuses."""
    answer = plain([3] * 2, 30)
    answer[15][0] = EOA

    def fail(push: int) -> None:
        if push == 3:
            raise EngineError("the codec failed")

    events, _ = stepping(Codec(beside=fail), Llm(answer), strict=True)
    with pytest.raises(EngineError, match="the codec failed"):
        list(events)


def test_cancel_while_a_push_runs() -> None:
    door = Door()
    codec, llm = Codec(beside=door.pass_), Llm(plain([3] * 2, 40))
    with no_thread_is_left():
        events, interrupt = stepping(codec, llm)
        until_push(events, door)
        made = len(llm.forwards)
        interrupt.set()
        door.open()
        rest = list(events)
    assert len(llm.forwards) == made and [type(e) for e in rest] == [Stop] and rest[0].reason == "cancelled"
    assert codec.unfinished == 0 and codec.threads == llm.threads == 4


def test_a_push_that_fails_as_the_turn_is_cancelled_is_told() -> None:
    door = Door()

    def fail(push: int) -> None:
        door.pass_()
        raise EngineError("the codec failed")

    events, interrupt = stepping(Codec(beside=fail), Llm(plain([3] * 2, 40)))
    until_push(events, door)
    interrupt.set()
    door.open()
    with pytest.raises(EngineError, match="the codec failed"):
        list(events)


@pytest.mark.parametrize("how", ["close", "drop", "throw"])
def test_closing_waits_for_the_push_under_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The door opens only once the loop shuts its worker down: whoever does not wait leaves a push unfinished."""
    door = Door()
    codec, llm = Codec(beside=door.pass_), Llm(plain([3] * 2, 40))
    shutdown = ThreadPoolExecutor.shutdown

    def opened(self: Any, *args: Any, **options: Any) -> None:
        door.open()
        shutdown(self, *args, **options)

    with no_thread_is_left():
        events, _ = stepping(codec, llm)
        until_push(events, door)
        monkeypatch.setattr(ThreadPoolExecutor, "shutdown", opened)
        if how == "close":
            events.close()
        elif how == "drop":
            del events
        else:
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt)
        assert codec.unfinished == 0 and codec.aside == 1
    assert codec.threads == llm.threads == 4


def test_ctrl_c_while_the_loop_waits_for_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(futures: Any) -> None:
        monkeypatch.undo()
        door.open()
        raise KeyboardInterrupt

    door = Door()
    codec = Codec(beside=door.pass_)
    monkeypatch.setattr(overlap, "wait", interrupted)
    with no_thread_is_left():
        events, _ = stepping(codec, Llm(plain([3] * 2, 40)))
        with pytest.raises(KeyboardInterrupt):
            list(events)
        assert codec.unfinished == 0


def test_a_worker_that_collects_its_own_answer_does_not_wait_for_itself() -> None:
    """A cycle of garbage that holds a dropped answer may be collected anywhere, also in the answer's own thread."""
    ended, door = list[str](), Door()

    def collect(push: int) -> None:
        door.pass_()
        player.close()
        ended.append(threading.current_thread().name)

    codec = Codec(beside=collect)
    player = Player(AudioStream(codec, SPEC.codec, Spans()), SharedThreads(parts([], codec), 4), Spans())
    codec.set_threads = lambda threads: None  # type: ignore[method-assign]
    with no_thread_is_left():
        for _ in range(4):
            player.add(np.zeros(K, np.int64), beside=True)
        door.open()
        until(lambda: bool(ended) and not codec.unfinished)
        for thread in threading.enumerate():
            if thread.name.startswith("edgeomni-codec"):
                thread.join(20)
    assert ended[0].startswith("edgeomni-codec")


# --- what it takes


def test_the_listeners_time_counts_only_while_the_codec_works_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward takes 1 s and each push 10 s, those beside the LLM at once when the listener has taken 30 s."""
    clock = Clock()
    clock.install(monkeypatch)
    door, players = Door(), list[Player]()

    class Kept(Player):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            players.append(self)

    monkeypatch.setattr(loop, "Player", Kept)
    codec = Codec(beside=lambda push: door.pass_())
    events, _ = stepping(codec, Llm(plain([3] * 2, K + 4), before=lambda n: clock.advance(1)))
    seen = []
    for event in events:
        seen.append(event)
        frames_seen = sum(isinstance(e, Frame) for e in seen)
        if isinstance(event, Frame) and frames_seen == K + 4:  # the push of 1 frame has just begun
            assert door.reached.wait(20)
            clock.advance(30)
            door.open()
            until(lambda: players[0].worked_until < float("inf"))
            clock.advance(500)
        else:
            clock.advance(1000)
    stop = seen[-1]
    assert isinstance(stop, Stop) and stop.busy_s == pytest.approx(K + 4 + 30)


def test_growth_ends_in_its_largest_chunk() -> None:
    assert max(GROWTH) == GROWTH[-1], "the timing of auto counts on it"
