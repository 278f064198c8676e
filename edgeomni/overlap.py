"""LLM beside codec: while the LLM makes the next frames, a thread of the answer decodes the chunk that is ready.

The pushes, their order and what they compute are those of an answer without it, so that the samples are the same to
the bit; what differs is when they are handed out: with one of the LLM frames that follow, at the latest with the one
that fills the next chunk. The first sound and the last chunk are decoded at once, with all threads: the listener waits
for the first, and at the last the LLM has nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from time import perf_counter
from typing import Literal

from .arrays import F32, I64
from .components import Components, SetsThreads
from .spans import Spans
from .streaming import AudioStream, Chunk

OverlapMode = Literal["off", "after-text", "on"]
OverlapChoice = Literal["auto", "on", "off"]
"""What is asked for: "auto" is the fastest mode on the machine (overlap_choice.py)."""


@dataclass(frozen=True)
class Overlap:
    """When the codec computes beside the LLM, and the `threads` that both then share (those of either alone).

    "after-text": once the LLM has one row left. Two rows gain more from a further thread than one row does, so that
    the codec had better wait while there are two.
    """

    mode: OverlapMode = "off"
    threads: int = 1

    def beside(self, rows: int) -> bool:
        """Whether a chunk is decoded beside the LLM's frames while it computes so many rows."""
        return self.mode == "on" or (self.mode == "after-text" and rows == 1)


class SharedThreads:
    """Divides the threads between LLM and codec while both compute: half for each, the LLM's half the larger one.

    Components that cannot change their threads keep all of them.
    """

    def __init__(self, components: Components, threads: int) -> None:
        self._all, self._shared = threads, False
        self._llm = components.llm if isinstance(components.llm, SetsThreads) else None
        self._codec = components.codec if isinstance(components.codec, SetsThreads) else None

    def prepare(self) -> None:
        """Has the components make ready for either, so that no answer waits for it."""
        self.share(True)
        self.share(False)

    def share(self, shared: bool) -> None:
        """True: each gets its part. False: each gets them all, since it computes alone."""
        if shared == self._shared:
            return
        self._shared = shared
        codec = max(1, self._all // 2) if shared else self._all
        llm = max(1, self._all - codec) if shared else self._all
        if self._llm is not None:
            self._llm.set_threads(llm)
        if self._codec is not None:
            self._codec.set_threads(codec)


class Player:
    """Plays codec frames through an AudioStream: here, or in a thread of its own.

    Errors of the codec are raised where its samples would have been handed out. Whoever is done calls `close`, which
    returns when no push runs any more and the thread has ended.
    """

    def __init__(self, stream: AudioStream, threads: SharedThreads, spans: Spans) -> None:
        self._stream, self._threads, self._spans = stream, threads, spans
        self._heard = False
        self._worker: ThreadPoolExecutor | None = None
        self._worker_id = 0
        self._running: Future[F32] | None = None
        self.worked_until = 0.0
        """The perf_counter at which the last push beside the LLM ended; infinite while one runs."""

    @property
    def silent_frames(self) -> int:
        """Codec frames so far that held ids that are no codec entries."""
        return self._stream.silent_frames

    def add(self, frame: I64, *, beside: bool) -> list[F32]:
        """Takes codec frame [K]; returns the samples [S] of each chunk that is finished by now, in order.

        A chunk that `frame` fills is decoded in the thread with `beside`, once there was sound, and here otherwise.
        One chunk is decoded at a time, so that a full one waits for the one before it.
        """
        chunk = self._stream.take(frame)
        if chunk is None:
            return [] if self._is_running() else self.wait()
        finished = self.wait()
        if beside and self._heard and self._start(chunk):
            return finished
        self._threads.share(False)
        samples = self._stream.push(chunk)
        self._heard = self._heard or len(samples) > 0
        return [*finished, samples]

    def share_threads(self) -> None:
        """Before each frame of the LLM: it has all threads to itself again once the codec is done."""
        self._threads.share(self._is_running())

    def wait(self) -> list[F32]:
        """The samples of the chunk under way, once it is decoded; nothing where none is."""
        if self._running is None:
            return []
        with self._spans("codec.wait"):
            wait([self._running])
        running, self._running = self._running, None
        return [running.result()]

    def finish(self) -> Iterator[F32]:
        """The rest of the answer, chunk by chunk."""
        yield from self.wait()
        self._threads.share(False)
        yield self._stream.finish()

    def close(self) -> None:
        """Waits for a push under way and drops what it gives. Further calls do nothing."""
        worker, self._worker = self._worker, None
        if worker is not None:  # the worker itself may be here: collecting garbage in the middle of its push
            worker.shutdown(wait=get_ident() != self._worker_id)
        self._running = None
        self._threads.share(False)

    def _is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    def _start(self, chunk: Chunk) -> bool:
        """Has the worker decode a chunk. False where no thread can be had: the system's limit, or Python is ending."""
        self._threads.share(True)
        self.worked_until, worker = float("inf"), self._worker or ThreadPoolExecutor(1, "edgeomni-codec")
        try:
            self._running = worker.submit(self._push, chunk)
        except RuntimeError:
            self._threads.share(False)
            self.worked_until = 0.0
            return False
        self._worker = worker
        return True

    def _push(self, chunk: Chunk) -> F32:
        self._worker_id = get_ident()
        try:
            return self._stream.push(chunk)
        finally:
            self.worked_until = perf_counter()


class BusyClock:
    """Counts the seconds in which LLM or codec compute: `stopped` takes the consumer's time out.

    A push that goes on beside the LLM goes on in the consumer's time too; so much of it counts.
    """

    def __init__(self, player: Player | None) -> None:
        self._player = player
        self.busy, self._since = 0.0, perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        left = perf_counter()
        self.busy += left - self._since
        yield
        self._since = perf_counter()
        if self._player is not None:
            self.busy += max(0.0, min(self._since, self._player.worked_until) - left)
