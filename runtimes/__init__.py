"""Engines that run a bundle's components, one folder each. Nothing here loads an engine before it is asked for.

What an engine's folder offers (the gate and `opened` ask for it by these names):

    open_component(bundle, name, options) -> a component (edgeomni/components.py). What cannot be opened here raises
        EngineError (EngineUnavailable says why in one word): then `opened` takes the next way that the bundle has
    open_exact(bundle, name, options) -> the same component, computing with float activations where its kernels would
        round them; None where the engine has no such mode
    wrong_kernels(bundle, name) -> how many linear layers run on another kernel than the precision asks for; None
        where the engine does not tell
    problem(device) -> why the engine cannot compute on that device here, and what to do; "" where it can. No bundle
        is needed for it
    version() -> the version of the engine's own library
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

from edgeomni import measured
from edgeomni.bundle import Bundle
from edgeomni.components import Components, OpenOptions
from edgeomni.engines import COMPONENTS, ENGINES, Engine, EngineChoice
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.runtimes.choice import Choice, Step, Way, choose, engines_used, ways_of

_log = logging.getLogger("edgeomni")
_said: set[str] = set()
"""Steps down that this process has told."""


@dataclass(frozen=True)
class Opened:
    """All three components, how each of them runs, and the steps down that were taken to get there."""

    components: Components
    ways: dict[str, Way]
    steps: tuple[Step, ...] = ()


def runtime_of(engine: Engine) -> ModuleType:
    """The folder of an engine, imported. Raises EngineError (with what to install) where its library is missing."""
    return import_module(f".{engine.folder}", __name__)


def problem(engine: Engine, device: str) -> str:
    """Why an engine cannot compute on a device here, and what to do; "" where it can, as far as can be told."""
    try:
        folder = runtime_of(engine)
    except EngineError as exc:
        return str(exc)
    except ImportError as exc:
        return f"{engine.name} is not installed or cannot be loaded ({exc}); {engine.install}"
    said: str = folder.problem(device) if hasattr(folder, "problem") else ""
    return said


def chosen_engine(bundle: Bundle, name: str, wanted: str | None = None) -> Engine:
    """The engine that judges a component as it was exported, on the CPU where it can; or the one wanted.

    Raises UsageError where `wanted` is no engine, or none that runs the component's format; EngineError where no
    engine does.
    """
    ways = ways_of(bundle.with_components({}), name, wanted)
    return next((way for way in ways if way.device == "cpu"), ways[0]).engine


def chosen(
    bundle: Bundle, engine: EngineChoice = None, device: str | None = None, threads: int | None = None
) -> Choice:
    """How each component would run here; see runtimes/choice.py. Nothing is opened.

    Raises UsageError for an engine or a device that does not exist or does not run a component, EngineError where no
    engine of this EdgeOmni runs its format.
    """
    return choose(bundle, problem, lambda: _profiles(bundle, threads), engine, device)


def _profiles(bundle: Bundle, threads: int | None) -> list[measured.Run]:
    """This machine's profiles of the bundle, made with the versions that the engines have now."""
    found = measured.runs(bundle.digest, threads)
    names = dict.fromkeys(name for run in found for name in run.versions if name in ENGINES)
    here = versions_of(ENGINES[name] for name in names)
    return [run for run in found if all(here.get(name) == version for name, version in run.versions.items())]


def opened(bundle: Bundle, choice: Choice, options: OpenOptions, strict: bool = False) -> Opened:
    """Opens all three components, each the first way of `choice` that can be opened; `options.device` is not used.

    Each step down is told once, as a warning with its reason and its price. Raises EngineError where a component
    cannot be opened in any way, and with `strict` where it cannot be in the way that comes first.
    """
    parts: dict[str, Any] = {}
    try:
        for name in COMPONENTS:
            parts[name] = _first_that_opens(bundle, name, choice, options, strict)
    except Exception:
        for part in parts.values():
            part.close()
        raise
    steps = tuple(choice.steps())
    tell(steps, bundle, options.threads)
    _tell_of_other_versions(bundle, engines_used(choice.first))
    return Opened(Components(parts["encoder"], parts["llm"], parts["codec"]), choice.first, steps)


def refuse(steps: Iterable[Step]) -> None:
    """Raises EngineUnavailable for the first step down, if there is any."""
    for step in steps:
        way, reason = step.passed[0]
        raise EngineUnavailable(
            "strict",
            f"the {step.component} cannot run on {way.label}: {reason}. It could run on {step.instead.label}, but "
            "--strict allows no step down; leave --strict out, or choose that with --engine and --device",
        )


def _first_that_opens(bundle: Bundle, name: str, choice: Choice, options: OpenOptions, strict: bool) -> Any:
    while True:
        if strict:
            refuse(step for step in choice.steps() if step.component == name)
        way = choice.ways[name][0]
        try:
            return _open(bundle, name, way, options)
        except (EngineError, MemoryError) as exc:
            if len(choice.ways[name]) == 1:
                _give_up(exc, choice.passed.get(name, []))
            choice.pass_over(name, str(exc) or "too little memory")


def _open(bundle: Bundle, name: str, way: Way, options: OpenOptions) -> Any:
    here = bundle.with_components({name: way.component})
    return runtime_of(way.engine).open_component(here, name, replace(options, device=way.device))


def _give_up(exc: Exception, passed: list[tuple[Way, str]]) -> None:
    """Raises what the last way said, and what was said of those before it."""
    if isinstance(exc, MemoryError):
        exc = EngineUnavailable("memory", "too little memory to open the bundle; close other programs")
    if not passed:
        raise exc
    kind = exc.kind if isinstance(exc, EngineUnavailable) else "graph"
    before = "; ".join(f"{way.label}: {reason}" for way, reason in passed)
    raise EngineUnavailable(kind, f"{exc}. What was tried before that: {before}") from exc


def open_components(bundle: Bundle, options: OpenOptions | None = None, engine: EngineChoice = None) -> Components:
    """Opens all three components as they were exported, on `options.device`, without the bundle's alternatives.

    `engine` insists on one engine. Raises UsageError and EngineError as `chosen` and `opened` do; there is no step
    down, so that what is judged is what was meant.
    """
    options, exported = options or OpenOptions(), bundle.with_components({})
    ways = {name: ways_of(exported, name, engine, options.device)[:1] for name in COMPONENTS}
    return opened(exported, Choice(dict(ways)), options, strict=True).components


def versions_of(engines: Iterable[Engine]) -> dict[str, str]:
    """Engine -> version of its library on this machine."""
    return {engine.name: runtime_of(engine).version() for engine in engines}


def tell(steps: Iterable[Step], bundle: Bundle, threads: int | None = None) -> None:
    """Warns of each step down, those that several components take for the same reasons in one line."""
    known: list[measured.Run] | None = None
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in steps:
        labels = tuple((way.engine.name, way.device, reason) for way, reason in step.passed)
        groups.setdefault((labels, step.instead.engine.name, step.instead.device), []).append(step)
    for same in groups.values():
        known = _profiles(bundle, threads) if known is None else known
        text = _sentence(same, bundle, known)
        if text not in _said:
            _said.add(text)
            _log.warning("%s", text)


def _sentence(same: list[Step], bundle: Bundle, known: list[measured.Run]) -> str:
    first = same[0]
    names = ", ".join(step.component for step in same)
    tried = "; ".join(f"{way.engine.name} on {way.device} cannot be used: {reason}" for way, reason in first.passed)
    prices = [measured.price(s.component, s.passed[0][0].label, s.instead.label, known) for s in same]
    paid = "; ".join(filter(None, prices)) or (
        f"what that costs here is not measured yet: `edgeomni profile {bundle.path}` tells"
    )
    runs = "run" if len(same) > 1 else "runs"
    return (
        f"{bundle.path}: {tried}; so {names} {runs} on {first.instead.engine.name} on {first.instead.device} instead. "
        f"Price: {paid}"
    )


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
