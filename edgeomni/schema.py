"""One way to read the documents that EdgeOmni is given: bytes -> plain data -> a typed dataclass.

Bundle manifests, checkpoint configurations and hardware profiles all come this way. Whatever a file holds, the outcome
is an object of the wanted type or the error that the caller chose; it names the file and the path of the key at fault
("$.components.llm.graphs.body.path"), and never carries a foreign exception to the user.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from .errors import EdgeOmniError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 1 << 26
"""A document larger than this (64 MiB) is refused unread; a real manifest has less than one."""
MOST_LEVELS = 64
"""Lists and objects inside one another; real documents have fewer than ten levels."""
LARGEST_INT = 1 << 63
"""Integers are below this, as in every language that might read the same document."""
_NAMED_AT_MOST = 8
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\Z")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,60}\Z")
_AT = re.compile(r" - at `.*`.*\Z", re.DOTALL)

_T = TypeVar("_T")
_log = logging.getLogger("edgeomni")


@dataclass(frozen=True)
class Source:
    """What is being read, and how its mistakes are told: as `error`, "<where>: <key path>: <what>; <remedy>"."""

    where: str
    error: type[EdgeOmniError]
    remedy: str

    def fault(self, what: str, path: str = "") -> EdgeOmniError:
        """The error to raise; `path` is the path of the key at fault, "" for the document as a whole."""
        return self.error(f"{self.where}: {path}{': ' if path else ''}{what}; {self.remedy}")


def read_bytes(path: Path, source: Source, most: int = MOST_BYTES) -> bytes:
    """The file's bytes, `most` of them. Raises the source's error for what is missing, unreadable, larger or no file.

    Opening never waits: a named pipe is refused instead of being read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as f:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise source.fault("is no regular file")
            raw = f.read(most + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise source.fault(f"cannot be read ({reason})") from exc
    if len(raw) > most:
        raise source.fault(f"is larger than {most} bytes")
    return raw


def parse_json(raw: bytes, source: Source) -> dict[str, Any]:
    """UTF-8 JSON -> its object. Raises the source's error for all else, repeated keys, NaN and infinities included."""
    text = _text(raw, source)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise source.fault(f"the key {short(twice)} stands twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as exc:
        raise source.fault(f"not valid JSON ({_reason(exc)})") from exc
    return _checked(data, source)


def parse_toml(raw: bytes, source: Source) -> dict[str, Any]:
    """UTF-8 TOML -> its table. Raises the source's error for all else, NaN and infinities included."""
    try:
        data = tomllib.loads(_text(raw, source))
    except (ValueError, RecursionError) as exc:
        raise source.fault(f"not valid TOML ({_reason(exc)})") from exc
    return _checked(data, source)


def is_newer(found: Any, ours: str, source: Source, key: str = "schema") -> bool:
    """Whether a document of schema version `found` ("MAJOR.MINOR") may hold keys that this EdgeOmni does not know.

    That is so for a newer minor version. Raises the source's error for another major version, and for what is no
    version. Whole numbers are versions from before there were minor ones.
    """
    whole = isinstance(found, int) and not isinstance(found, bool)
    match = _VERSION.match(f"{found}.0" if whole else found) if whole or isinstance(found, str) else None
    if match is None:
        raise source.fault(f"schema version {short(found)} is not of the form {ours!r}", f"$.{key}")
    major, minor = (int(part) for part in match.groups())
    our_major, our_minor = (int(part) for part in ours.split("."))
    if major > our_major:
        raise source.error(
            f"{source.where}: $.{key}: schema version {short(found)} is newer than {ours}, which this EdgeOmni reads; "
            "update EdgeOmni"
        )
    if major < our_major:
        raise source.fault(f"schema version {short(found)} is older than {ours}, which this EdgeOmni reads", f"$.{key}")
    return minor > our_minor


def typed(data: Any, kind: type[_T], source: Source, *, newer: bool = False, path: str = "$") -> _T:
    """Plain data -> an object of the dataclass `kind`, with all that lies in it. Raises the source's error.

    Keys that `kind` does not have are an error; with `newer` (see `is_newer`) they are left out and told once.
    """
    if unknown := list(_unknown(data, kind, path)):
        named = ", ".join(unknown[:_NAMED_AT_MOST]) + (", ..." if len(unknown) > _NAMED_AT_MOST else "")
        if not newer:
            raise source.fault(f"unknown key(s) {named}")
        _log.warning(
            "%s was written by a newer EdgeOmni; these keys are not understood here and ignored: %s. Update EdgeOmni",
            source.where,
            named,
        )
    try:
        return msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, EdgeOmniError) as exc:
        at, what = _fault(data, kind, path) or (path, _said(exc))
        raise source.fault(what, at) from exc


def below(path: str, key: str | int) -> str:
    """The path of a key within what lies at `path`: "$.a" and "b" -> "$.a.b"; odd keys are shown quoted."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if _WORD.match(key) else f"{path}[{short(key)}]"


def short(value: Any) -> str:
    """A value as an error message may quote it: printable ASCII, at most 80 characters."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(raw: bytes, source: Source) -> str:
    if not raw.strip():
        raise source.fault("the file is empty")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise source.fault("starts with a byte order mark; it must be plain UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise source.fault(f"is not UTF-8 (byte {exc.start})") from exc


def _reason(exc: Exception) -> str:
    return "nested too deeply" if isinstance(exc, RecursionError) else str(exc).partition("; use sys.")[0]


def _checked(data: Any, source: Source) -> dict[str, Any]:
    """Refuses what no document of EdgeOmni holds and what would hurt later: see `_odd`. Never recurses."""
    if not isinstance(data, dict):
        raise source.fault(f"holds {short(data)} instead of an object")
    waiting: list[tuple[Any, str, int]] = [(data, "$", 1)]
    while waiting:
        value, path, level = waiting.pop()
        if odd := _odd(value, level):
            raise source.fault(odd, path)
        if isinstance(value, dict):
            if bad := [key for key in value if _odd(key, 0)]:
                raise source.fault(f"a key {_odd(bad[0], 0)}", path)
            waiting += [(v, below(path, k), level + 1) for k, v in value.items()]
        elif isinstance(value, list):
            waiting += [(v, below(path, i), level + 1) for i, v in enumerate(value)]
    return data


def _odd(value: Any, level: int) -> str:
    """What is wrong with one value, "" for nothing."""
    if level > MOST_LEVELS and isinstance(value, (dict, list)):
        return f"nested more than {MOST_LEVELS} levels deep"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {value}"
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        return "must be a number below 2**63"
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return "holds half of a character (an unpaired surrogate)"
    return ""


def _fields(kind: Any) -> dict[str, Any]:
    return _hints(kind)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _chosen(kind: Any, data: Any) -> Any:
    """The type without its annotations; of a union, the member that objects or lists would be read as."""
    if get_origin(kind) is Annotated:
        return _chosen(get_args(kind)[0], data)
    if get_origin(kind) in (dict, list, tuple) or is_dataclass(kind):
        return kind
    wanted = (dict,) if isinstance(data, dict) else (list, tuple) if isinstance(data, list) else ()
    for member in get_args(kind):
        if get_origin(member) in wanted or (is_dataclass(member) and isinstance(data, dict)):
            return member
    return kind


def _children(data: Any, kind: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """What lies in `data`, with the type that it should have and its path."""
    kind = _chosen(kind, data)
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(data, dict):
        for name, hint in _fields(kind).items():
            if name in data:
                yield data[name], hint, below(path, name)
    elif origin is dict and isinstance(data, dict):
        yield from ((value, inner[1], below(path, key)) for key, value in data.items())
    elif origin in (list, tuple) and isinstance(data, list):
        yield from ((value, inner[0], below(path, i)) for i, value in enumerate(data))


def _unknown(data: Any, kind: Any, path: str) -> Iterator[str]:
    """Paths of the keys that the type has no field for."""
    chosen = _chosen(kind, data)
    if is_dataclass(chosen) and isinstance(data, dict):
        yield from (below(path, key) for key in data if key not in _fields(chosen))
    for child in _children(data, kind, path):
        yield from _unknown(*child)


def _fault(data: Any, kind: Any, path: str) -> tuple[str, str] | None:
    """Path and description of the innermost thing that does not fit its type; msgspec names no keys of a dict."""
    for child in _children(data, kind, path):
        if found := _fault(*child):
            return found
    try:
        msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, EdgeOmniError) as exc:
        return path, _said(exc)
    return None


def _said(exc: Exception) -> str:
    text = str(exc) if isinstance(exc, EdgeOmniError) else _AT.sub("", str(exc))
    return text if len(text) <= 300 else f"{text[:297]}..."
