"""A request to stop one turn, made from any thread while the turn computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """Work ended early because its Interrupt was set. The session makes a cancelled turn of it; users never see it."""


class Interrupt:
    """A flag that the steps of a turn look at, and that can also end an engine's call that is under way.

    It takes no lock, so that `set` may be called from any thread and from a signal handler.

    >>> interrupt = Interrupt()
    >>> with interrupt.stopping(lambda: print("stop the engine")):
    ...     interrupt.set()
    stop the engine
    >>> interrupt.is_set()
    True
    """

    def __init__(self) -> None:
        self._set = False
        self._stops: list[Callable[[], None]] = []

    def set(self) -> None:
        """Asks the turn to stop, and every call inside `stopping` to end early."""
        self._set = True
        for stop in tuple(self._stops):
            stop()

    def is_set(self) -> bool:
        return self._set

    def check(self) -> None:
        """Raises Interrupted if `set` was called."""
        if self._set:
            raise Interrupted

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `set` also calls `stop`, which may then be called more than once."""
        self._stops.append(stop)
        try:
            if self._set:  # `set` may have looked at the list before `stop` was in it
                stop()
            yield
        finally:
            self._stops.remove(stop)
