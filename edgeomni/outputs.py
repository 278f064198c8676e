"""Where results go: every file and directory that EdgeOmni writes appears whole or not at all, and replaces nothing
that the user did not allow.

An output is made in a workspace beside its target (workspaces.py) and gets its name by one rename, which the file
system refuses where something has that name by then. With `force`, what is replaced trades places with the new one.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError
from .renames import exchange, rename_new
from .workspaces import NEW, OLD, workspace

Objection = Callable[[Path], str]
"""Why a directory must not be replaced ("is no bundle"), or "" where it may be."""

_SHOWN = 3
_TRIES = 5


def check_directory(path: str | os.PathLike[str], objection: Objection | None = None) -> Path:
    """The path, if a new directory may be put there. `objection` None: only where nothing is yet.

    Otherwise what is there may be replaced if it is an empty directory or `objection` has none. Raises UsageError.
    The check spares minutes of work; what counts is the rename when the work is done.
    """
    shown = named(path)
    if os.path.lexists(shown):
        if objection is None:
            raise UsageError(f"{shown} exists; choose another path, or overwrite it with --force")
        _refuse(shown, _real(shown), objection)
    return shown


def check_file(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The path, if a file may be written there. Raises UsageError if it exists (without force) or its folder does not.

    Pipes and devices are written to as they are; only a disk (a block device) needs `force`.
    """
    shown = named(path)
    if shown.is_dir():
        raise UsageError(f"{shown} is a directory; give a file name")
    if os.path.lexists(shown) and not force and not is_stream(shown):
        raise UsageError(f"{shown} exists; give another name, or --force to overwrite it")
    if not _real(shown).parent.is_dir():
        raise UsageError(f"{shown.parent}: no such directory; make it first")
    return shown


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a character device: what is written there replaces nothing."""
    mode = _mode(path)
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_special(path: Path) -> bool:
    """Whether `path` exists and is neither a regular file nor a directory."""
    mode = _mode(path)
    return mode != 0 and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two spellings lead to one file, which need not exist yet."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return _real(Path(a)) == _real(Path(b))


def strangers(directory: Path, known: set[str]) -> list[str]:
    """What lies in a directory beside the `known` files (relative, '/' between parts) and their folders, sorted."""
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    found = set[str]()
    for root, dirs, files in os.walk(directory):
        here = Path(root).relative_to(directory)
        found |= {(here / name).as_posix() for name in [*dirs, *files]} - known - folders
        dirs[:] = [name for name in dirs if (here / name).as_posix() in folders]
    return sorted(found)


def first_few(names: list[str]) -> str:
    """Names for a message: "a, b, c and 2 more"."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def new_directory(path: str | os.PathLike[str], objection: Objection | None = None) -> Iterator[Path]:
    """An empty directory to fill, which becomes `path` when the block ends well and is gone when it does not.

    Missing parents are made. `objection` is as in `check_directory`. Where `path` is a link, the directory it leads to
    is replaced and the link stays. Raises UsageError where something is there that may not be replaced, also if it
    appeared meanwhile, and OSError for what the disk refuses.
    """
    target = _real(named(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with workspace(target, lambda: check_directory(path, objection)) as work:
        (work / NEW).mkdir()
        yield work / NEW
        _place(work / NEW, target, Path(path), replace=None if objection is None else _exchanger(path, objection))


@contextmanager
def new_file(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """An empty file to fill, which becomes `path` when the block ends well and is gone when it does not.

    Where `path` is a link, the file it leads to is replaced and the link stays; `is_special` ones are handed out as
    they are. Raises UsageError and OSError as `new_directory` does.
    """
    shown = check_file(path, force)
    if is_special(shown):
        yield shown
        return
    target = _real(shown)
    with workspace(target, lambda: check_file(path, force)) as work:
        (work / NEW).touch()
        yield work / NEW
        _place(work / NEW, target, shown, replace=_overwrite if force else None)


def write_file(path: str | os.PathLike[str], data: bytes, force: bool = False) -> None:
    """Writes a file whole or not at all. Raises UsageError and OSError as `new_file` does."""
    with new_file(path, force) as part, part.open("wb") as f:
        f.write(data)


def user_cache() -> Path:
    """Where EdgeOmni may keep small files that can be made anew: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "edgeomni"


def named(path: str | os.PathLike[str]) -> Path:
    """The path of an output. Raises UsageError for what cannot name one: nothing at all, or a zero byte."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UsageError(f"{text!r} cannot be the name of an output; give a path")
    return Path(text)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int:
    """Kind and permissions of what `path` leads to, 0 where nothing is."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _refuse(shown: Path, there: Path, objection: Objection) -> None:
    """Raises UsageError if what lies at `there` is the user's; `shown` is how the user calls it."""
    free = not os.path.lexists(there) or (there.is_dir() and not any(there.iterdir()))
    if not free and (reason := objection(there)):
        raise UsageError(f"{shown} {reason}, so --force does not overwrite it; remove it yourself")


def _place(new: Path, target: Path, shown: Path, replace: Callable[[Path, Path], None] | None) -> None:
    """Gives `new` its name. What has that name by now is refused, or handed to `replace(new, target)`."""
    for _ in range(_TRIES):
        try:
            return rename_new(new, target)
        except FileExistsError as exc:
            if replace is None:
                raise UsageError(
                    f"{shown} appeared meanwhile and was left as it is; choose another path, or use --force"
                ) from exc
        with contextlib.suppress(FileNotFoundError):  # it has just gone away: the name is free again
            return replace(new, target)
    raise UsageError(f"{shown} comes and goes while it is written; choose another path")


def _overwrite(new: Path, target: Path) -> None:
    check_file(target, force=True)
    if is_special(target):
        raise UsageError(f"{target} has become a pipe or a device meanwhile; choose another path")
    new.replace(target)


def _exchanger(path: str | os.PathLike[str], objection: Objection) -> Callable[[Path, Path], None]:
    """Replaces a directory; what was there is looked at once more when nobody can reach it under its name."""

    def replace(new: Path, target: Path) -> None:
        old = new.with_name(OLD)
        _refuse(Path(path), target, objection)
        if exchange(new, target):
            new.rename(old)
        else:
            target.rename(old)
            rename_new(new, target)
        try:
            _refuse(Path(path), old, objection)
        except BaseException:
            target.rename(new)  # `old` beside `new` says that nothing was replaced: _clear gives it its name back
            raise

    return replace
