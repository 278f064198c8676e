"""Which engine of a bundle runs here: one that the bundle brings, one from the cache, or one that is built now.

What an engine was made for is compared before TensorRT sees it: GPU, package and version. A stale or foreign one is
never loaded; the bundle's portable graph is built into an engine instead, once for this machine.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from edgeomni.bundle import Bundle, Component
from edgeomni.errors import EngineUnavailable, ExportError
from edgeomni.install_hint import install_command
from edgeomni.runtimes.tensorrt import cache
from edgeomni.runtimes.tensorrt.device import Facts
from edgeomni.runtimes.tensorrt.library import EXTRAS, Library, installed, library_of, too_old, version_of
from edgeomni.runtimes.tensorrt.opening import Serialized
from edgeomni.tensorrt_builder import Recipe, build_engine, predicted_bytes
from edgeomni.tensorrt_targets import TARGETS

_DRIVER = Path("/proc/driver/nvidia/version")
_log = logging.getLogger("edgeomni")


def serialized(bundle: Bundle, component: Component, facts: Facts) -> dict[str, Serialized]:
    """The engine of each of the component's graphs, by role, mapped into memory.

    Building is told, engine by engine. Raises EngineUnavailable where an engine can be neither found nor built.
    """
    places = {role: _shipped(bundle, component, role, facts) for role in component.graphs}
    libraries: dict[str, Library] = {}
    found: dict[str, Serialized] = {}
    for role, (package, place) in places.items():
        package = package or _package(facts, component, place)
        library = libraries[package] = libraries.get(package) or library_of(package)
        key = _key(bundle, component, role, facts, library)
        path = place if isinstance(place, Path) else _built(bundle, component, key, place)
        found[role] = Serialized(library, _mapped(path), key.kernels)
    return found


def _shipped(bundle: Bundle, component: Component, role: str, facts: Facts) -> tuple[str, Path | str]:
    """Package and file of the bundle's own engine for this machine; "" and the reason where it has none."""
    reasons = []
    for entry in component.meta["engines"]:
        if entry["role"] == role:
            if not (reason := _unfit(entry, facts)):
                return entry["package"], bundle.file(entry["path"])
            reasons.append(reason)
    return "", "; ".join(dict.fromkeys(reasons)) or "the bundle brings none"


def _unfit(entry: dict[str, Any], facts: Facts) -> str:
    """Why an engine of the bundle does not fit this machine; "" where it does."""
    package, wanted = entry["package"], entry["version"]
    if facts.sm not in entry["targets"]:
        return f"the bundle's is for {', '.join(entry['targets'])}, and this GPU is {facts.sm}"
    if not (here := version_of(package)):
        return f"the bundle's is of {package}, which is not installed"
    return "" if here == wanted else f"the bundle's is of {package} {wanted}, and here is {here}"


def _key(bundle: Bundle, component: Component, role: str, facts: Facts, library: Library) -> cache.Key:
    return cache.Key(
        gpu=facts.name,
        sm=facts.sm,
        driver=_driver(facts),
        package=library.name,
        version=library.version,
        bundle=bundle.digest,
        component=component.name,
        role=role,
        precision=component.precision,
    )


def _built(bundle: Bundle, component: Component, key: cache.Key, why: str) -> Path:
    """The cached engine of a graph, which is built first where there is none."""
    if (path := cache.find(key)) is None:
        _build(bundle, component, key, why)
        path = cache.find(key)
    if path is None:
        raise EngineUnavailable(
            "damaged",
            f"{component.name}/{key.role}: the engine just built cannot be read from {key.folder}; check the disk",
        )
    return path


def _build(bundle: Bundle, component: Component, key: cache.Key, why: str) -> None:
    role, began = key.role, perf_counter()
    what, graphs = f"{component.name}/{role}", list(component.graphs)
    graph, recipe = bundle.file(component.graphs[role].path), Recipe(**component.meta["recipes"][role])
    _log.warning(
        "building the engine of %s (%d of %d of the %s) for %s, once for this machine, with about %.1f GB of memory: "
        "%s",
        what,
        graphs.index(role) + 1,
        len(graphs),
        component.name,
        key.gpu,
        predicted_bytes(graph) / 1e9,
        why,
    )
    try:
        with cache.storing(key) as target:
            build_engine(graph, target, recipe, package=key.package, progress=lambda line: _log.info("%s", line))
    except ExportError as exc:
        raise EngineUnavailable("graph", f"{what} cannot be built for {key.gpu}: {exc}") from exc
    _log.warning("built the engine of %s in %.0f s", what, perf_counter() - began)


def _package(facts: Facts, component: Component, why: object) -> str:
    """The installed package that builds for this GPU: TensorRT for RTX where it knows the GPU, else TensorRT."""
    known = TARGETS.get(facts.sm)
    able = [name for name in EXTRAS if name == "tensorrt" or (known is not None and known.rtx)]
    if here := installed(able):
        if said := too_old(here[0]):
            raise EngineUnavailable("version", said)
        return here[0]
    raise EngineUnavailable(
        "package",
        f"the {component.name} needs an engine for {facts.name} ({facts.sm}), and nothing is installed that builds or "
        f"runs one ({why}); {install_command(EXTRAS[able[0]])}",
    )


def _driver(facts: Facts) -> str:
    """The CUDA version that the driver serves, and the driver's own version where the system tells."""
    return " ".join([str(facts.driver), *_driver_version()])


def _driver_version() -> Iterator[str]:
    try:
        text = _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", text):
        yield found[0]


def _mapped(path: Path) -> mmap.mmap:
    """The file's bytes, read as they are needed: an engine need not be in memory beside its copy on the GPU."""
    with path.open("rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
