"""The bundle: a directory with `bundle.json` and the components' files; all that a device needs, and all that it reads.

Nothing is ever inferred from a file name. Every path goes through `Bundle.file`. Sizes are checked whenever a bundle
is opened, hashes on the first load on a machine and on `edgeomni verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path, PurePosixPath
from typing import Any

from .component_meta import check_path
from .errors import BundleError
from .manifest import REMEDY, Component, FileEntry, GraphEntry, Manifest, Port
from .onnx_files import external_files
from .outputs import user_cache
from .schema import Source, parse_json, read_bytes, short
from .shipped import found
from .spec import OmniSpec

__all__ = ["Bundle", "Component", "FileEntry", "GraphEntry", "Manifest", "Port", "describe_files", "write_manifest"]

MANIFEST = "bundle.json"
SETTLED_S = 2.0
"""How old a file must be, in seconds, before its verification is remembered."""
_SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".onnx"}
"""Format -> how its graphs' names end. ONNX Runtime would read another suffix, .ort, as another format."""


class Bundle:
    """An opened bundle: its manifest, and safe paths to its files."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def spec(self) -> OmniSpec:
        return self.manifest.spec

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, hashes: bool | None = None) -> Bundle:
        """Reads and checks a bundle; the name of a shipped model ("nano") stands for its bundle.

        `hashes`: True checks every file's SHA-256, False only sizes, None hashes on the first load on this
        machine (remembered in the user's cache). Raises BundleError that names what is wrong.
        """
        root = Path(found(path, "bundle"))
        bundle = cls(root, _read_manifest(root))
        bundle._check_files(hashes)
        return bundle

    def with_components(self, entries: Mapping[str, Component]) -> Bundle:
        """The same bundle as it would be with these entries in place of its own, and without alternatives.

        The entries are its own or alternatives of it: the files that they name must be the bundle's.
        """
        manifest = copy(self.manifest)
        manifest.components = {**self.manifest.components, **entries}
        manifest.alternatives = {}
        return Bundle(self.path, manifest)

    def file(self, relative: str) -> Path:
        """The file of the bundle at this path, which the manifest must list.

        Raises BundleError for what the manifest does not list, for paths and links that leave the bundle, and for
        what is missing or no regular file.
        """
        if relative not in {entry.path for entry in self.entries()}:
            raise BundleError(f"{self.path}: file {short(relative)} is not among the listed files; {REMEDY}")
        return _inside(self.path, relative)

    def entries(self) -> list[FileEntry]:
        """All files that the manifest lists, each once."""
        files = [f for c in self.exports() for f in c.files]
        others = [f for f in (self.manifest.tokenizer, self.manifest.reference) if f is not None]
        return list(dict.fromkeys(files + others))

    def exports(self) -> list[Component]:
        """The entries of all components, and after them all alternatives."""
        return [*self.manifest.components.values(), *(c for entries in self._alternatives().values() for c in entries)]

    def _alternatives(self) -> dict[str, list[Component]]:
        return getattr(self.manifest, "alternatives", {})

    @property
    def size(self) -> int:
        """Bytes of all components' files."""
        return sum(f.size for f in self.entries())

    @property
    def digest(self) -> str:
        """SHA-256 over the spec and all files but the recorded outputs: the same for the same export anywhere."""
        h = hashlib.sha256(json.dumps(self.spec.to_dict(), sort_keys=True).encode())
        for f in sorted(self.entries(), key=lambda f: f.path):
            if f == self.manifest.reference:
                continue
            h.update(f"{f.path} {f.size} {f.sha256}\n".encode())
        return h.hexdigest()

    def verify(self) -> None:
        """Checks every file's SHA-256, and that graphs read no file beside them that the manifest does not list.

        Raises BundleError that names all altered files, or the graph.
        """
        before = _states(self)
        altered = [e.path for e in self.entries() if sha256(self.file(e.path)) != e.sha256]
        if altered:
            raise BundleError(
                f"{self.path}: {', '.join(altered)} differ(s) from the recorded SHA-256: "
                "the bundle was altered or damaged; copy or export it again"
            )
        for component in self.exports():
            self._check_external(component)
        if _states(self) != before:
            raise BundleError(f"{self.path}: files changed while they were verified; verify the bundle again")

    def _check_files(self, hashes: bool | None) -> None:
        for component in self.exports():
            self._check_listed(component)
        self._check_entries()
        if hashes is False:
            return
        stamp = _stamp_path(self)
        if hashes is None and stamp.exists():
            return
        self.verify()
        if _stamp_path(self) == stamp and _settled(self):
            _leave_stamp(stamp)

    def _check_listed(self, component: Component) -> None:
        listed = {entry.path for entry in component.files}
        for what, path in component.opened().items():
            if path not in listed:
                raise BundleError(
                    f"{self.path}: {component.name}, {short(what)}: {path} is not among the listed files; {REMEDY}"
                )
        suffix = _SUFFIX.get(component.format, "")
        if wrong := [g.path for g in component.graphs.values() if not g.path.endswith(suffix)]:
            raise BundleError(f"{self.path}: {component.name}: graph {wrong[0]} must end in {suffix}; {REMEDY}")

    def _check_entries(self) -> None:
        paths = [entry.path for entry in self.entries()]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise BundleError(f"{self.path}: {twice[0]} is listed with two sizes or hashes; {REMEDY}")
        for entry in self.entries():
            if (size := self.file(entry.path).stat().st_size) != entry.size:
                raise BundleError(
                    f"{self.path}: {entry.path} has {size} bytes instead of {entry.size}; copy the bundle again"
                )

    def _check_external(self, component: Component) -> None:
        """Graphs name further files within themselves; a file that no hash covers must not be among them."""
        if component.format not in _SUFFIX:
            return
        listed = {entry.path for entry in component.files}
        for role, graph in component.graphs.items():
            path = self.file(graph.path)
            beside = {path.with_suffix(".bin").name} if component.format == "openvino" else external_files(path)
            for location in sorted(beside):
                if str(PurePosixPath(graph.path).parent / location) not in listed:
                    raise BundleError(
                        f"{self.path}: graph {short(f'{component.name}/{role}')} reads {short(location)}, which is not "
                        "among the listed files; do not trust this bundle"
                    )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Writes bundle.json. Raises BundleError for a NaN or an infinity, which JSON has no number for."""
    try:
        text = json.dumps(manifest.to_dict(), indent=1, sort_keys=True, allow_nan=False)
    except ValueError as exc:
        raise BundleError(f"{root}: the manifest holds a number that is not finite; write it as text") from exc
    (root / MANIFEST).write_text(text + "\n", encoding="utf-8")


def describe_files(root: Path, paths: Iterable[Path]) -> list[FileEntry]:
    """FileEntry of each path, relative to `root`, in order of name."""
    return [FileEntry(p.relative_to(root).as_posix(), p.stat().st_size, sha256(p)) for p in sorted(set(paths))]


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_slow(f)


def _sha256_slow(f: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    h = hashlib.sha256()
    while block := f.read(1 << 20):
        h.update(block)
    return h.hexdigest()


def is_bundle(path: str | os.PathLike[str]) -> bool:
    return (Path(path) / MANIFEST).is_file()


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"{root}: no such bundle; make one with `edgeomni export CHECKPOINT -o {root}`")
    if not path.is_file():
        raise BundleError(f"{root}: has no {MANIFEST}, so it is not a bundle; make one with `edgeomni export`")
    source = Source(str(path), BundleError, REMEDY)
    return Manifest.from_dict(parse_json(read_bytes(_inside(root, MANIFEST), source), source), str(path))


def _inside(root: Path, relative: str) -> Path:
    """root / relative, a regular file that lies under root. Raises BundleError."""
    try:
        check_path(relative)
        path = root / relative
        if not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(f"path {short(relative)} leaves the bundle through a link; do not trust this bundle")
        if not stat.S_ISREG(path.stat().st_mode):
            raise BundleError(f"{relative} is no regular file; {REMEDY}")
    except BundleError as exc:
        raise BundleError(f"{root}: {exc}") from exc
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise BundleError(f"{root}: file {relative} is missing; copy the bundle again, whole") from exc
    except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: links that lead to each other
        raise BundleError(f"{root}: file {short(relative)} cannot be reached ({exc}); {REMEDY}") from exc
    return path


def _states(bundle: Bundle) -> list[str]:
    """One line per file, bundle.json included, that changes with every write, rename or touch.

    The time of modification can be set back by anyone who may write the file; the time of change (ctime) cannot.
    """
    states = []
    for relative, digest in [(MANIFEST, ""), *((e.path, e.sha256) for e in bundle.entries())]:
        s = _inside(bundle.path, relative).stat()
        states.append(f"{relative} {digest} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino} {s.st_dev}")
    return states


def _stamp_path(bundle: Bundle) -> Path:
    """Where it is remembered that these files, in exactly this state, were verified."""
    seen = hashlib.sha256("\n".join([str(bundle.path.resolve()), *_states(bundle)]).encode())
    return user_cache() / "verified" / seen.hexdigest()


def _settled(bundle: Bundle) -> bool:
    """Whether no file changed within the clock's last ticks: a change in the same tick would not show in its state."""
    paths = [MANIFEST, *(entry.path for entry in bundle.entries())]
    newest = max(_inside(bundle.path, path).stat().st_ctime for path in paths)
    return newest + SETTLED_S <= time.time()


def _leave_stamp(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        pass  # a read-only home only means that hashes are checked again next time
