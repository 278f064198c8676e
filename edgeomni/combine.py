"""Bundles of one checkpoint -> one bundle that has each component in every format that they have it in.

The first bundle is what the result is without its alternatives: it is judged, replayed and run as that one was. What
the others have in further formats becomes an alternative, for `--engine auto` to choose from. Nothing is exported or
judged again: every component was, in the bundle that it comes from, whose gate is kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, Bundle, is_bundle, write_manifest
from .errors import BundleError, UsageError
from .manifest import Component, Manifest
from .outputs import check_directory, first_few, new_directory, strangers
from .shipped import found

FOLDER = "alternatives"


def combine(sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, force: bool = False) -> Bundle:
    """Writes the bundle directory `out` from at least two bundles, whose files are all verified first.

    Raises UsageError for bundles of different checkpoints, for those that add no format, and for a path that may not
    be written; BundleError for a bundle that is damaged; OSError for what the disk refuses.
    """
    if len(sources) < 2:
        raise UsageError("combine takes two bundles or more: what they share, and what each adds")
    objection = _objection if force else None
    target = check_directory(out, objection)
    bundles = [Bundle.open(found(source, "bundle"), hashes=True) for source in sources]
    for bundle in bundles:
        if Path(os.path.realpath(target)) == Path(os.path.realpath(bundle.path)):
            raise UsageError(f"{target} is one of the bundles to combine; choose another path")
        _check_same(bundles[0], bundle)
    taken = _taken(bundles)
    with new_directory(target, objection) as stage:
        manifest = _combined(bundles, taken, stage)
        write_manifest(stage, manifest)
        Bundle.open(stage, hashes=True)
    return Bundle.open(target, hashes=False)


def _objection(directory: Path) -> str:
    """Why --force must not replace a directory; "" for a bundle that holds its own files and nothing else."""
    if not is_bundle(directory):
        return "is no bundle"
    try:
        listed = {entry.path for entry in Bundle.open(directory, hashes=False).entries()}
    except BundleError:
        return f"has a {MANIFEST} that cannot be read, so what else is in it may be yours"
    others = strangers(directory, listed | {MANIFEST})
    return f"also holds {first_few(others)}, which its {MANIFEST} does not list" if others else ""


def _check_same(first: Bundle, other: Bundle) -> None:
    """Components are exchangeable only where they are the same model's, behind the same tokenizer."""
    ours, theirs = (b.manifest.provenance.get("source_hash") for b in (first, other))
    tokenizers = [b.manifest.tokenizer.sha256 if b.manifest.tokenizer else "" for b in (first, other)]
    for what, same in (
        ("checkpoint (provenance.source_hash)", bool(ours) and ours == theirs),
        ("spec", first.spec.to_dict() == other.spec.to_dict()),
        ("tokenizer", len(set(tokenizers)) == 1),
    ):
        if not same:
            raise UsageError(
                f"{other.path} is not of the same {what} as {first.path}, so their components do not fit together; "
                "export both from one checkpoint"
            )


def _taken(bundles: Sequence[Bundle]) -> list[tuple[int, Component]]:
    """(place of the bundle, component) of every alternative: the first in each format that nothing before it has."""
    seen = {(c.name, c.format) for c in bundles[0].exports()}
    taken = []
    for i, bundle in enumerate(bundles[1:], 1):
        for component in bundle.exports():
            if (key := (component.name, component.format)) not in seen:
                seen.add(key)
                taken.append((i, component))
    if not taken:
        raise UsageError(f"{bundles[0].path} has every component in every format already; there is nothing to add")
    return taken


def _combined(bundles: Sequence[Bundle], taken: Sequence[tuple[int, Component]], stage: Path) -> Manifest:
    first = bundles[0]
    manifest = deepcopy(first.manifest)
    for entry in first.entries():
        _copy(first, entry.path, stage / entry.path)
    offset = 1 + max((int(p.split("/")[1]) for p in _numbered(first)), default=0)
    for i, component in taken:
        folder = f"{FOLDER}/{offset + i - 1}"
        for entry in component.files:
            _copy(bundles[i], entry.path, stage / folder / entry.path)
        manifest.alternatives.setdefault(component.name, []).append(_moved(component, folder))
    kept = first.manifest.gate.get("alternatives", {})
    gates = {**kept} if isinstance(kept, dict) else {}
    gates |= {str(offset + i - 1): bundles[i].manifest.gate for i in dict.fromkeys(i for i, _ in taken)}
    versions = [bundle.manifest.gate.get("engines") for bundle in reversed(bundles)]
    engines: dict[str, str] = {}
    for known in versions:
        engines |= known if isinstance(known, dict) else {}
    manifest.gate = {**manifest.gate, "engines": engines, "alternatives": gates}
    return manifest


def _numbered(bundle: Bundle) -> list[str]:
    """Paths of alternatives that the bundle has from an earlier combination."""
    paths = [entry.path for entry in bundle.entries() if entry.path.startswith(f"{FOLDER}/")]
    if strange := [path for path in paths if not path.split("/")[1].isdigit()]:
        raise BundleError(f"{bundle.path}: {strange[0]} is in the folder of alternatives; export the checkpoint again")
    return paths


def _moved(component: Component, folder: str) -> Component:
    """The entry with every path below `folder`, also those that its `meta` names."""
    listed = {entry.path for entry in component.files}
    return replace(
        component,
        graphs={role: replace(g, path=f"{folder}/{g.path}") for role, g in component.graphs.items()},
        files=[replace(entry, path=f"{folder}/{entry.path}") for entry in component.files],
        meta=_renamed(component.meta, listed, folder),
    )


def _renamed(value: Any, listed: set[str], folder: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(item, listed, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, listed, folder) for item in value]
    return f"{folder}/{value}" if isinstance(value, str) and value in listed else value


def _copy(bundle: Bundle, path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle.file(path), target)
