"""Engines that run a bundle's components. Nothing here loads an engine before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeomni.bundle import Bundle
from edgeomni.components import Components
from edgeomni.errors import BundleError

ENGINES: dict[str, dict[str, tuple[str, str]]] = {
    "onnxruntime": {
        "encoder": ("onnxruntime.encoder", "OrtEncoder"),
        "llm": ("onnxruntime.llm", "OrtLanguageModel"),
        "codec": ("onnxruntime.codec", "OrtCodec"),
    }
}
"""Engine -> component -> (module, class). The class is called with (path, component, spec, sessions)."""


def load(bundle: Bundle, *, threads: int | None = None, device: str = "cpu") -> Components:
    """Opens all three components, each with the engine that its manifest entry names.

    `threads` per session (None: all cores). Raises BundleError for an engine that this version does not know and
    EngineError for one that is not installed or cannot load its graphs.
    """
    sessions = _SessionsByEngine(threads, device)
    encoder, llm, codec = (_open(bundle, name, sessions) for name in ("encoder", "llm", "codec"))
    return Components(encoder, llm, codec)


def load_component(
    bundle: Bundle, name: str, *, threads: int | None = None, device: str = "cpu", exact: Collection[Path] = ()
) -> Any:
    """Opens one of encoder, llm, codec; graphs in `exact` round no activations. Raises as `load` does."""
    return _open(bundle, name, _SessionsByEngine(threads, device, exact))


def _open(bundle: Bundle, name: str, sessions: Callable[[str], Any]) -> Any:
    component = bundle.manifest.components[name]
    adapters = ENGINES.get(component.engine, {})
    if name not in adapters:
        raise BundleError(
            f"{bundle.path}: the {name} wants the engine {component.engine!r}, which this EdgeOmni does not have; "
            f"known are {', '.join(ENGINES)}"
        )
    module, cls = adapters[name]
    adapter = getattr(import_module(f".{module}", __name__), cls)
    return adapter(bundle.path, component, bundle.spec, sessions(component.engine))


class _SessionsByEngine:
    """One session factory per engine, made when the first component asks for it."""

    def __init__(self, threads: int | None, device: str, exact: Collection[Path] = ()) -> None:
        self._threads, self._device, self._exact = threads, device, exact
        self._made: dict[str, Any] = {}

    def __call__(self, engine: str) -> Any:
        if engine not in self._made:
            from edgeomni.runtimes.onnxruntime.sessions import SessionFactory  # the only engine with sessions so far

            self._made[engine] = SessionFactory(self._threads, self._device, exact=self._exact)
        return self._made[engine]
