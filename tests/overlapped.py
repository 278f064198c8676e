"""Scripted parts whose pushes beside the LLM go on when a test says so: what the tests of the overlapped mode share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

from turns import SPEC, Recorder

from edgeomni.components import Components
from edgeomni.overlap import Overlap
from edgeomni.runtimes import fake
from edgeomni.spans import Spans

PATIENCE_S = 20
"""A test that waits longer for another thread has failed."""
ON, AFTER_TEXT = Overlap("on", 4), Overlap("after-text", 4)


class Codec(fake.FakeCodec):
    """The scripted codec. `beside` is called in the worker's thread before it decodes a chunk, with the chunk's number
    among those. `threads` of `set_threads` are noted with each push, newest last; `unfinished` pushes are under way.
    """

    def __init__(self, spec: Any = SPEC, beside: Callable[[int], object] = lambda _: None, **codec: int) -> None:
        super().__init__(spec, **codec)
        self.beside, self.home = beside, threading.get_ident()
        self.threads, self.given_threads = 4, list[tuple[bool, int]]()
        self.aside = self.unfinished = 0

    def set_threads(self, threads: int) -> None:
        assert not self.unfinished, "the threads of a push under way were changed"
        self.threads = threads

    def decode(self, codes: Any, state: Any, last: bool) -> Any:
        aside = threading.get_ident() != self.home
        self.given_threads.append((aside, self.threads))
        self.unfinished += 1
        try:
            if aside:
                self.aside += 1
                self.beside(self.aside - 1)
            return super().decode(codes, state, last)
        finally:
            self.unfinished -= 1


class Llm(Recorder):
    """The scripted LLM, which calls `before` with the number of the forward that is about to run, and notes threads."""

    def __init__(self, frames: Sequence[Sequence[int]], before: Callable[[int], object] = lambda _: None) -> None:
        super().__init__(SPEC, frames)
        self.before, self.threads, self.forwards = before, 4, list[int]()

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def forward(self, *args: Any, **how: Any) -> Any:
        self.before(len(self.forwards))
        self.forwards.append(self.threads)
        return super().forward(*args, **how)


class Schedule:
    """Push n beside the LLM ends after delays[n] more forwards, or when the loop waits for it: random, repeatable.

    `codec`, `llm` and `spans` are the parts of one turn.
    """

    def __init__(self, frames: Sequence[Sequence[int]], delays: Sequence[int], **codec: int) -> None:
        self._delays, self._moved = delays, threading.Condition()
        self._forwards = self._waits = 0
        self.codec, self.llm, self.spans = (
            Codec(SPEC, self._hold, **codec),
            Llm(frames, self._forward),
            Waits(self._wait),
        )

    def _hold(self, push: int) -> None:
        with self._moved:
            until = self._forwards + self._delays[push % len(self._delays)]
            assert self._moved.wait_for(lambda: self._forwards >= until or self._waits > push, PATIENCE_S)

    def _forward(self, number: int) -> None:
        with self._moved:
            self._forwards += 1
            self._moved.notify_all()

    def _wait(self) -> None:
        with self._moved:
            self._waits += 1
            self._moved.notify_all()


class Waits(Spans):
    """Calls `waiting` when the loop begins to wait for the codec."""

    def __init__(self, waiting: Callable[[], object]) -> None:
        super().__init__()
        self._waiting = waiting

    def __call__(self, name: str) -> Any:
        if name == "codec.wait":
            self._waiting()
        return super().__call__(name)


class Door:
    """`pass_` waits until the door is open; `reached` is set when someone is at it."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def pass_(self, *args: Any) -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE_S), "the door stayed shut"

    def open(self, *args: Any) -> None:
        self._open.set()


def until(there: Callable[[], bool]) -> None:
    """Waits for what another thread does. Raises AssertionError where it never does."""
    last = monotonic() + PATIENCE_S
    while not there():
        assert monotonic() < last
        sleep(0.001)


def parts(frames: Sequence[Sequence[int]], codec: Codec, llm: Llm | None = None) -> Components:
    return Components(fake.FakeEncoder(SPEC), llm or Llm(frames), codec)


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    """Raises AssertionError for a thread that is there after the block and was not before."""
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before
