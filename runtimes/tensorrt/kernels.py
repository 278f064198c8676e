"""What TensorRT for RTX has compiled on this machine for an engine, kept from one process to the next.

Its engines hold no finished kernels: they are compiled when a context is made or first used. The result is only valid
for one engine, GPU and driver, which the file's name is made of, and TensorRT checks it once more. The file is a
SHA-256 and what it is the hash of, so that a cut one is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

from edgeomni.errors import EdgeOmniError
from edgeomni.outputs import write_file

_HASH = 32
_log = logging.getLogger("edgeomni")


class Kernels:
    """The compiled kernels of one engine, in the file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path, self._stored = path, _read(path)
        self._cache: Any = None

    def use(self, config: Any) -> None:
        """Lets contexts made with this IRuntimeConfig share the kernels."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._stored and not self._cache.deserialize(self._stored):
                _log.info("compiled kernels in %s are not for this TensorRT; they are compiled again", self._path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes what has been compiled since. A cache that cannot be written costs the next start some seconds."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        data = b"" if memory is None else bytes(memory)
        if not data or data == self._stored:
            return
        with contextlib.suppress(OSError, EdgeOmniError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, hashlib.sha256(data).digest() + data, force=True)
            self._stored = data

    def close(self) -> None:
        self._cache = None


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        return b""
    return data[_HASH:] if hashlib.sha256(data[_HASH:]).digest() == data[:_HASH] else b""
