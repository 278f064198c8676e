"""The commands of a training recipe as processes, one at a time in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError
from ..workspaces import orderly_end

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_INTERRUPTED = (130, -signal.SIGINT)
_GRACE_S = 60.0
"""How long a command that Ctrl-C has told to end may take for it."""


def run_command(words: list[str], root: Path) -> int:
    """Runs `edgeomni` with these words in the folder `root`, on this terminal, and returns its exit code.

    Where this process is told to end, so is the command, which first puts its things in order. Raises
    KeyboardInterrupt where Ctrl-C ended it.
    """
    command = [sys.executable, "-m", "edgeomni", *words]
    with orderly_end(), subprocess.Popen(command, cwd=root, close_fds=False) as process:  # the lock goes with it
        try:
            code = process.wait()
        except KeyboardInterrupt:  # which the terminal sends to the command too
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            raise
        finally:
            process.terminate()  # of one that has ended, this does nothing
    if code in _INTERRUPTED:
        raise KeyboardInterrupt
    return code


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
