"""Engines built on this machine, kept in the user's cache, and loaded again only for exactly what they were built for.

    <cache>/edgeomni/engines/<hash of the key>/engine.json    key, size and SHA-256
                                              /engine         what TensorRT reads
                           /kernels/<hash of the key>         what it compiled for it (kernels.py)

An entry is written whole or not at all. One that is cut, altered or of another key than its name says is never loaded:
it counts as missing, and the next build replaces it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeomni.bundle import sha256
from edgeomni.errors import BundleError, EngineUnavailable, UsageError
from edgeomni.outputs import new_directory, user_cache
from edgeomni.schema import Source, parse_json, read_bytes, typed

_RECORD, _ENGINE = "engine.json", "engine"
_REMEDY = "it is built again"
_log = logging.getLogger("edgeomni")


@dataclass(frozen=True)
class Key:
    """What an engine is good for: one GPU with its driver, one version of one package, one graph of one bundle.

    `bundle` is the bundle's digest, which covers the graph, its weights and the recipe by which it is built.
    """

    gpu: str
    sm: str
    driver: str
    package: str
    version: str
    bundle: str
    component: str
    role: str
    precision: str

    def same_purpose(self, other: Key) -> bool:
        """Whether it is the same engine of the same model on the same GPU, built by or under another version."""
        return all(
            getattr(self, n) == getattr(other, n) for n in ("gpu", "sm", "component", "role", "precision", "bundle")
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:40]

    @property
    def folder(self) -> Path:
        return _root() / self.digest

    @property
    def kernels(self) -> Path:
        """The file of compiled kernels, also for an engine that the bundle brings."""
        return _root() / "kernels" / self.digest


@dataclass(frozen=True)
class Record:
    key: Key
    size: int
    sha256: str


def find(key: Key) -> Path | None:
    """The engine built for `key`; None where there is none that is whole. Why one is not, is told."""
    if not (key.folder / _RECORD).exists():
        return None
    fault = _fault(key)
    if fault:
        _log.warning("the engine of %s/%s in the cache %s, so %s", key.component, key.role, fault, _REMEDY)
        return None
    return key.folder / _ENGINE


@contextmanager
def storing(key: Key) -> Iterator[Path]:
    """A path to write the engine to, which is in the cache when the block ends well.

    What stands there for the key is replaced, and what was built for the same purpose under other versions deleted.
    Raises EngineUnavailable where the cache cannot be written.
    """
    try:
        with new_directory(key.folder, objection=lambda _: "") as work:
            yield work / _ENGINE
            engine = work / _ENGINE
            record = Record(key, engine.stat().st_size, sha256(engine))
            (work / _RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    except (OSError, UsageError) as exc:
        raise EngineUnavailable(
            "graph",
            f"{key.component}/{key.role}: the engine cannot be kept in {_root()} ({exc}); make room there, or set "
            "XDG_CACHE_HOME to a folder that can be written",
        ) from exc
    _delete_stale(key)


def _fault(key: Key) -> str:
    """Why the entry of that key must not be loaded; "" where it may be."""
    engine = key.folder / _ENGINE
    try:
        record = _read(key.folder)
        if record.key != key:
            return "was built for something else"
        if (size := engine.stat().st_size) != record.size:
            return f"has {size} bytes instead of {record.size}"
        return "" if sha256(engine) == record.sha256 else "differs from what was built"
    except (BundleError, OSError) as exc:
        return f"cannot be read ({exc})"


def _read(folder: Path) -> Record:
    source = Source(str(folder / _RECORD), BundleError, _REMEDY)
    return typed(parse_json(read_bytes(folder / _RECORD, source), source), Record, source)


def _delete_stale(key: Key) -> None:
    for folder in _root().glob("*/"):
        if folder == key.folder or not (folder / _RECORD).is_file():
            continue
        try:
            stale = _read(folder).key.same_purpose(key)
        except BundleError:
            continue  # unreadable: left to the build that needs its place
        if stale:
            shutil.rmtree(folder, ignore_errors=True)


def _root() -> Path:
    return user_cache() / "engines"
