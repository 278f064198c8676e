"""Workspaces: where an output is made before it gets its name, and what becomes of it when its process is killed.

A workspace is a directory `.edgeomni-XXXXXXXX` beside the target:

    lock    held (flock) while its process lives; says whose target this is
    new     what is being made
    old     what was replaced, until it is deleted

A process that is killed leaves its workspace behind. The next one that writes to the same folder deletes it, and
first gives `old` its name back where the replacement had not happened yet. A workspace whose lock is held is left
alone, and so is everything that only looks like one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError
from .renames import rename_new

try:
    import fcntl
except ImportError:  # Windows: nothing is swept there
    fcntl = None  # type: ignore[assignment]

NEW, OLD = "new", "old"
_PREFIX, _LOCK = ".edgeomni-", "lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger("edgeomni")


@contextmanager
def workspace(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """A directory beside `target` to work in, held by a lock, and gone afterwards. `check` runs when those of dead
    processes are cleared away, which may have brought something back.
    """
    with orderly_end():
        _sweep(target.parent)
        check()
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # raises OSError for a name that is too long, before any work is done for it
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
        lock = -1
        try:
            lock = _locked(work / _LOCK, target.name)
            yield work
        finally:
            try:
                _clear(work, target)
            finally:
                if lock >= 0:
                    os.close(lock)


@contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the block like an exception, then end the process with the usual code 128 + n.

    Only in the main thread, and only for signals that would have killed the process: one that the application handles
    or ignores (nohup) stays as it is.
    """
    taken = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        taken = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)  # the unwinding is not to be cut short by a second one
        raise SystemExit(128 + number)

    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) in (end, signal.SIG_IGN):  # unless the application has set its own meanwhile
                signal.signal(number, signal.SIG_DFL)


def _locked(path: Path, name: str) -> int:
    """Makes the lock file, and takes the lock before a word is in it: what a sweeper can read is held, or dead."""
    lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: the file stays empty, nobody sweeps it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(lock, json.dumps({"target": name, "machine": _machine()}).encode())
    return lock


def _machine() -> list[str]:
    """What names this machine: the host's name outlives a restart, the boot id is shared by its containers."""
    with contextlib.suppress(OSError):
        return [socket.gethostname(), _BOOT_ID.read_text(encoding="ascii").strip()]
    return [socket.gethostname()]


def _clear(work: Path, target: Path) -> None:
    """Deletes a workspace. An `old` beside a `new` was not replaced: it gets its name back, or stays here for good.

    Raises ExportError in the latter case, which says where it is.
    """
    old = work / OLD
    if os.path.lexists(old) and os.path.lexists(work / NEW):
        try:
            rename_new(old, target)
        except OSError as exc:
            (work / _LOCK).unlink(missing_ok=True)  # so that it is never swept
            _delete(work / NEW)
            raise ExportError(f"{target}: could not get back its older contents; they are in {old}") from exc
    for each in (work / NEW, work / OLD):  # before the lock, so that what a kill leaves of them can still be swept
        _delete(each)
    shutil.rmtree(work, ignore_errors=True)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Clears away the workspaces that dead processes of this user left in a folder."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    _sweep_one(Path(entry.path))


def _sweep_one(work: Path) -> None:
    """Raises OSError, ValueError, TypeError or KeyError for what is held, or is no workspace."""
    lock = os.open(work / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = json.loads(os.read(lock, 1 << 16))
        name = owner["target"]
        ours = work.stat().st_uid == os.geteuid() and set(owner["machine"]) & set(_machine())
        if ours and name == Path(name).name:
            _clear(work, work.with_name(name))
    except ExportError as exc:
        _log.warning("%s", exc)
    finally:
        os.close(lock)
