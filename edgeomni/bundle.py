"""The bundle: a directory with `bundle.json` and the components' files; all that a device needs.

Nothing is ever inferred from a file name. Sizes are checked whenever a bundle is opened, hashes on the first load
on a machine and on `edgeomni verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .engines import COMPONENTS
from .errors import BundleError, SpecError
from .spec import OmniSpec

SCHEMA = 1
MANIFEST = "bundle.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of a component, its path relative to the bundle, with '/' between parts."""

    path: str
    size: int
    sha256: str


@dataclass
class Component:
    """What runs one of encoder, llm, codec.

    `scheme` maps tensor groups to how they are stored ("body": "int4_b32"); `graphs` maps a graph's role to
    {"path", "inputs", "outputs"}; `meta` is what the engine's adapter needs beyond that.
    """

    name: str
    engine: str
    format: str
    precision: str
    scheme: dict[str, str]
    graphs: dict[str, dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    files: list[FileEntry] = field(default_factory=list)


@dataclass
class Manifest:
    spec: OmniSpec
    components: dict[str, Component]
    tokenizer: FileEntry | None
    provenance: dict[str, Any]
    licences: dict[str, str]
    gate: dict[str, Any]
    reference: FileEntry | None = None
    """What the export gave when it was judged (gate/reference.py), for `verify --gate`."""
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Manifest:
        """Raises BundleError for a foreign schema version or missing parts."""
        if data.get("schema") != SCHEMA:
            raise BundleError(
                f"{where}: schema version {data.get('schema')!r}, but this EdgeOmni reads version {SCHEMA}; "
                "export the checkpoint again with this version"
            )
        try:
            components = {
                name: Component(**{**c, "files": [FileEntry(**f) for f in c["files"]]})
                for name, c in data["components"].items()
            }
            tokenizer = FileEntry(**data["tokenizer"]) if data["tokenizer"] else None
            spec = OmniSpec.from_dict(data["spec"])
            if missing := [name for name in COMPONENTS if name not in components]:
                raise BundleError(f"{where}: component(s) {', '.join(missing)} missing; export again")
            kept = FileEntry(**data["reference"]) if data.get("reference") else None
            return cls(spec, components, tokenizer, data["provenance"], data["licences"], data["gate"], kept)
        except (KeyError, TypeError, AttributeError, SpecError) as exc:
            raise BundleError(f"{where}: not a valid manifest ({exc}); export the checkpoint again") from exc


class Bundle:
    """An opened bundle: its manifest, and safe paths to its files."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def spec(self) -> OmniSpec:
        return self.manifest.spec

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, hashes: bool | None = None) -> Bundle:
        """Reads and checks a bundle.

        `hashes`: True checks every file's SHA-256, False only sizes, None hashes on the first load on this
        machine (remembered in the user's cache). Raises BundleError that names what is wrong.
        """
        root = Path(path)
        bundle = cls(root, _read_manifest(root))
        bundle._check_files(hashes)
        return bundle

    def file(self, relative: str) -> Path:
        """Path of a file of the bundle; refuses anything that leaves it."""
        return _inside(self.path, relative)

    def entries(self) -> list[FileEntry]:
        """Every file that the manifest lists."""
        files = [f for c in self.manifest.components.values() for f in c.files]
        return files + [f for f in (self.manifest.tokenizer, self.manifest.reference) if f is not None]

    @property
    def size(self) -> int:
        """Bytes of all components' files."""
        return sum(f.size for f in self.entries())

    @property
    def digest(self) -> str:
        """SHA-256 over the spec and all files but the recorded outputs: the same for the same export anywhere."""
        h = hashlib.sha256(json.dumps(self.spec.to_dict(), sort_keys=True).encode())
        for f in sorted(self.entries(), key=lambda f: f.path):
            if f is self.manifest.reference:
                continue
            h.update(f"{f.path} {f.size} {f.sha256}\n".encode())
        return h.hexdigest()

    def _check_files(self, hashes: bool | None) -> None:
        for component in self.manifest.components.values():
            listed = {f.path for f in component.files}
            for role, graph in component.graphs.items():
                if graph["path"] not in listed:
                    raise BundleError(f"{self.path}: graph {component.name}/{role} is not among the listed files")
        for entry in self.entries():
            path = self.file(entry.path)
            if not path.is_file():
                raise BundleError(f"{self.path}: file {entry.path} is missing; copy the bundle again, whole")
            if (size := path.stat().st_size) != entry.size:
                raise BundleError(
                    f"{self.path}: {entry.path} has {size} bytes instead of {entry.size}; copy the bundle again"
                )
        stamp = _stamp_path(self)
        if hashes is False or (hashes is None and stamp.exists()):
            return
        self.verify()
        _leave_stamp(stamp)

    def verify(self) -> None:
        """Checks every file's SHA-256. Raises BundleError that names all altered files."""
        altered = [e.path for e in self.entries() if sha256(self.file(e.path)) != e.sha256]
        if altered:
            raise BundleError(
                f"{self.path}: {', '.join(altered)} differ(s) from the recorded SHA-256: "
                "the bundle was altered or damaged; copy or export it again"
            )


def write_manifest(root: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.to_dict(), indent=1, sort_keys=True)
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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as exc:
        raise BundleError(f"{path}: not valid JSON ({exc}); copy or export the bundle again") from exc
    if not isinstance(data, dict):
        raise BundleError(f"{path}: not a manifest; copy or export the bundle again")
    return Manifest.from_dict(data, str(path))


def _inside(root: Path, relative: str) -> Path:
    parts = PurePosixPath(relative)
    escapes = parts.is_absolute() or ".." in parts.parts or "\\" in relative or ":" in relative
    path = root / parts
    if escapes or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: path {relative!r} leaves the bundle; do not trust this bundle")
    return path


def _stamp_path(bundle: Bundle) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    seen = hashlib.sha256(str(bundle.path.resolve()).encode())
    for e in bundle.entries():
        stat = bundle.file(e.path).stat()
        seen.update(f"{e.path} {e.sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return Path(base) / "edgeomni" / "verified" / seen.hexdigest()


def _leave_stamp(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        pass  # a read-only home only means that hashes are checked again next time
