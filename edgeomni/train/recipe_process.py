"""The commands of a training recipe as processes, one or a few at a time in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..workspaces import orderly_end

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_INTERRUPTED = (130, -signal.SIGINT)
GRACE_S = 60.0
"""How long a command that Ctrl-C has told to end may take for it."""
GLANCE_S = 0.5
"""How long the main thread waits at a time: Python handles a signal that comes just before a wait only at its end."""


@dataclass(frozen=True)
class Beside:
    """How a command runs that has others beside it: with how many threads, and what stands before its lines."""

    name: str
    threads: int


_running = set["subprocess.Popen[str]"]()


def run_command(words: list[str], root: Path, beside: Beside | None = None) -> int:
    """Runs `edgeomni` with these words in the folder `root`, on this terminal, and returns its exit code.

    A command with others `beside` it has its lines printed to stderr with its name before them. Where this process is
    told to end, so is the command, which first puts its things in order. Raises KeyboardInterrupt where Ctrl-C ended
    the command.
    """
    command = [sys.executable, "-m", "edgeomni", *words]
    with orderly_end(), _begun(command, root, beside) as process:
        _running.add(process)
        try:
            if beside is not None:
                _repeat_lines(process, beside.name)
            code = _end_of(process)
        except KeyboardInterrupt:  # which the terminal sends to the command too
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            raise
        finally:
            process.terminate()  # of one that has ended, this does nothing
            _running.discard(process)
    if code in _INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _begun(command: list[str], root: Path, beside: Beside | None) -> subprocess.Popen[str]:
    """The command's process, which inherits the folder's lock."""
    if beside is None:
        return subprocess.Popen(command, cwd=root, close_fds=False, text=True)
    shared = {**os.environ, "OMP_NUM_THREADS": str(beside.threads)}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=root, close_fds=False, text=True, stdout=pipe, stderr=both, env=shared)


def end_commands(tasks: Iterable[Future[Any]], grace_s: float = 0.0) -> None:
    """Ends the commands that other threads run for `tasks`, and returns once all tasks are done.

    Commands are given `grace_s` seconds to end by themselves. What has not begun is not begun any more; a command that
    is begun in this very moment is ended as soon as its thread knows of it.
    """
    left, until = [task for task in tasks if not task.cancel()], time.monotonic() + grace_s
    told = set["subprocess.Popen[str]"]()
    while not all(task.done() for task in left):
        if time.monotonic() >= until:
            for process in set(_running) - told:
                process.terminate()
                told.add(process)
        time.sleep(0.05)


def _end_of(process: subprocess.Popen[str]) -> int:
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(GLANCE_S)


def _repeat_lines(process: subprocess.Popen[str], name: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(f"[{name}] {line.rstrip()}\n")  # in one piece: print writes the end of a line apart
        sys.stderr.flush()


def ended(code: int) -> str:
    """How a command ended that returned this code, which is not 0."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    return f"was killed by signal {-code}"


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Holds the folder's lock, which the commands inherit: one that outlives its killed parent still holds it.

    Raises UsageError where another process has it. A file system without locks has none.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        os.set_inheritable(handle, True)
        if not _locked(handle):
            raise UsageError(f"{root}: another process is at work in it; wait until it has ended, or stop it")
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Whether the lock is ours by now, or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
