"""Engines that run a bundle's components, one folder each. Nothing here loads an engine before it is asked for.

What an engine's folder offers (the gate and `open_components` ask for it by these names):

    open_component(bundle, name, options) -> a component (edgeomni/components.py)
    open_exact(bundle, name, options) -> the same component, computing with float activations where its kernels would
        round them; None where the engine has no such mode
    wrong_kernels(bundle, name) -> how many linear layers run on another kernel than the precision asks for; None
        where the engine does not tell
    version() -> the version of the engine's own library
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from edgeomni.bundle import Bundle
from edgeomni.components import Components, OpenOptions
from edgeomni.engines import COMPONENTS, Engine, engine_of, engines_for
from edgeomni.errors import UsageError

_log = logging.getLogger("edgeomni")


def runtime_of(engine: Engine) -> ModuleType:
    """The folder of an engine, imported. Raises EngineError (with what to install) where its library is missing."""
    return import_module(f".{engine.folder}", __name__)


def chosen_engine(bundle: Bundle, name: str, wanted: str | None = None) -> Engine:
    """The engine that runs component `name` of `bundle`: the one wanted, or the preferred one that can.

    Raises UsageError where `wanted` is no engine, or none that runs the component's format; EngineError where no
    engine does.
    """
    component = bundle.manifest.components[name]
    able = engines_for(component.format, name)
    if wanted is None:
        return able[0]
    if (engine := engine_of(wanted)) not in able:
        raise UsageError(
            f"{bundle.path}: the {name} is {component.format}, which {wanted} does not run; engines that do: "
            f"{', '.join(e.name for e in able)}. To use {wanted}, export the checkpoint to "
            f"{' or '.join(engine.formats)}"
        )
    return engine


def open_components(bundle: Bundle, options: OpenOptions | None = None, engine: str | None = None) -> Components:
    """Opens all three components, each on an engine that runs its format.

    `engine` insists on one engine for all of them. Raises UsageError and EngineError as `chosen_engine` does, and
    EngineError for an engine that is not installed or cannot load its graphs.
    """
    options = options or OpenOptions()
    engines = {name: chosen_engine(bundle, name, engine) for name in COMPONENTS}
    _tell_of_other_versions(bundle, engines.values())
    opened = {name: runtime_of(engine).open_component(bundle, name, options) for name, engine in engines.items()}
    return Components(opened["encoder"], opened["llm"], opened["codec"])


def versions_of(engines: Iterable[Engine]) -> dict[str, str]:
    """Engine -> version of its library on this machine."""
    return {engine.name: runtime_of(engine).version() for engine in engines}


def _tell_of_other_versions(bundle: Bundle, engines: Iterable[Engine]) -> None:
    """Warns where the gate judged the bundle with another version of an engine than this machine has."""
    judged = bundle.manifest.gate.get("engines", {})
    for name, here in versions_of(engines).items():
        if isinstance(judged, dict) and judged.get(name, here) != here:
            _log.warning(
                "this bundle was judged with %s %s, and this machine has %s, which may round otherwise; "
                "`edgeomni verify %s --gate` shows whether it chooses otherwise",
                name,
                judged[name],
                here,
                bundle.path,
            )
