"""Renames that the file system decides in one step: never over something (`rename_new`), and two names swapped.

Linux and macOS have calls for both. Where a system or a file system lacks them, `rename_new` takes the closest thing
that POSIX offers, and `exchange` says that it could not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

_NEW, _EXCHANGE = "new", "exchange"
_LINUX = {_NEW: 1, _EXCHANGE: 2}
"""RENAME_NOREPLACE and RENAME_EXCHANGE of renameat2(2)."""
_MACOS = {_NEW: 4, _EXCHANGE: 2}
"""RENAME_EXCL and RENAME_SWAP of renamex_np(2)."""
_AT_FDCWD = -100
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""What a kernel, a file system or a sandbox answers that does not know the call."""


def rename_new(source: Path, target: Path) -> None:
    """Gives a file or a directory the name `target` on the same file system.

    Raises FileExistsError where anything has that name, a dangling link included; then nothing has changed.
    """
    if os.name == "nt":
        os.rename(source, target)  # refuses an existing name by itself there
    elif not _native(_NEW, source, target):
        _rename_new_directory(source, target) if source.is_dir() else _rename_new_file(source, target)


def exchange(a: Path, b: Path) -> bool:
    """Swaps the names of two existing things, so that neither name is ever missing. False: this system cannot."""
    return os.name != "nt" and _native(_EXCHANGE, a, b)


def _native(kind: str, source: Path, target: Path) -> bool:
    """Asks the system for a rename of this kind. False: it does not know it. Raises OSError for every other failure."""
    rename = _system_call()
    if rename is None or rename(kind, os.fsencode(source), os.fsencode(target)) != 0:
        code = errno.ENOSYS if rename is None else ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        return False
    return True


@lru_cache
def _system_call() -> Callable[[str, bytes, bytes], int] | None:
    """The C library's call, errno kept, or None where it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return lambda kind, a, b: int(libc.renamex_np(a, b, ctypes.c_uint(_MACOS[kind])))
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return lambda kind, a, b: int(libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_LINUX[kind])))
    return None


def _rename_new_directory(source: Path, target: Path) -> None:
    """Reserves the name with an empty directory, which POSIX lets a rename replace as long as it is still empty."""
    os.mkdir(target)
    try:
        os.rename(source, target)
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from exc
        os.rmdir(target)
        raise


def _rename_new_file(source: Path, target: Path) -> None:
    """Links the file to its new name; file systems without hard links get an empty file first, which is replaced."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(source, target)
    else:
        os.unlink(source)
