"""Which engine and device run a component here: every way that the bundle has, the best one first.

Without a profile of this machine the order is: a GPU before the CPU, an engine's own format before one that it runs as
a stand-in, and then as the bundle and `ENGINES` list them. A GPU is taken into account where the system shows one, and
where the bundle was made for one. A profile decides between ways that were all measured (edgeomni/measured.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edgeomni import measured
from edgeomni.bundle import Bundle, Component
from edgeomni.engines import AUTO, COMPONENTS, ENGINES, Engine, EngineChoice, engines_for, wanted_engine
from edgeomni.errors import EngineError, UsageError
from edgeomni.hardware import has_nvidia_gpu

FOR_CPUS = {"onnx": ("ort",)}
"""Format -> flavours whose operators are those of a CPU: a GPU runs them slower than others, so it is not tried."""

Probe = Callable[[Engine, str], str]
"""(engine, device) -> why it cannot be used here, "" where it can."""


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run a component: an entry of the manifest, the engine and the device."""

    component: Component
    engine: Engine
    device: str

    @property
    def label(self) -> str:
        """As profiles and messages name it: "onnxruntime on cpu (onnx:int4)"."""
        return f"{self.engine.name} on {self.device} ({self.component.format}:{self.component.precision})"

    @property
    def stands_in(self) -> bool:
        """Whether the engine runs a format that is another engine's own."""
        return self.component.format != self.engine.formats[0]


@dataclass(frozen=True)
class Step:
    """A step down of `component`: each of `passed`, the one wanted first, cannot run it here, each for its reason."""

    component: str
    passed: tuple[tuple[Way, str], ...]
    instead: Way


@dataclass
class Choice:
    """For each component the ways that are left, the best first, and those that were passed over, with the reason.

    `measured`: what a profile of this machine says of the ways chosen; None where the order above decided.
    """

    ways: dict[str, list[Way]]
    passed: dict[str, list[tuple[Way, str]]] = field(default_factory=dict)
    measured: measured.Run | None = None

    @property
    def first(self) -> dict[str, Way]:
        return {name: ways[0] for name, ways in self.ways.items()}

    def steps(self) -> list[Step]:
        """The steps down that this choice amounts to, of each component that takes any."""
        return [Step(name, tuple(passed), self.ways[name][0]) for name, passed in self.passed.items() if passed]

    def pass_over(self, name: str, reason: str) -> None:
        """The first way of a component, which is not its last, turned out to be impossible."""
        self.passed.setdefault(name, []).append((self.ways[name].pop(0), reason))


def ways_of(bundle: Bundle, name: str, engine: EngineChoice = None, device: str | None = None) -> list[Way]:
    """Every way to run component `name`, the best first, whether it works on this machine or not.

    `engine` and `device` narrow them. Raises UsageError where nothing is left of them, EngineError where no engine of
    this EdgeOmni runs any of the component's formats.
    """
    wanted = wanted_engine(engine, name)
    entries = [bundle.manifest.components[name], *getattr(bundle.manifest, "alternatives", {}).get(name, [])]
    able = _able(entries, name)
    chosen = [(entry, e) for entry, e in able if wanted is None or e is wanted]
    if not chosen:
        raise UsageError(_not_run(bundle, name, wanted, able))
    ways = [Way(entry, e, d) for entry, e in chosen for d in _devices(entry, e, device, insisted=wanted is not None)]
    if not ways:
        names = ", ".join(dict.fromkeys(e.name for _, e in chosen))
        raise UsageError(
            f"{bundle.path}: the {name} runs on {names}, which knows no device {device}; leave --device out, or export "
            f"the checkpoint for an engine that does"
        )
    return sorted(ways, key=lambda way: (way.device == "cpu", way.stands_in))


def choose(
    bundle: Bundle,
    probe: Probe,
    known: Callable[[], Sequence[measured.Run]],
    engine: EngineChoice = None,
    device: str | None = None,
) -> Choice:
    """The ways that work here as far as `probe` can tell without opening anything; each component keeps at least one.

    Raises as `ways_of`. `known` gives the profiles to choose by, and is asked only where there is a choice.
    """
    probed: dict[tuple[str, str], str] = {}

    def said(way: Way) -> str:
        key = way.engine.name, way.device
        if key not in probed:
            probed[key] = probe(way.engine, way.device)
        return probed[key]

    choice = Choice({})
    for name in COMPONENTS:
        choice.ways[name] = ways_of(bundle, name, engine, device)
        while len(choice.ways[name]) > 1 and (reason := said(choice.ways[name][0])):
            choice.pass_over(name, reason)
    if any(len(ways) > 1 for ways in choice.ways.values()):
        _by_profile(choice, known(), said)
    return choice


def _by_profile(choice: Choice, known: Sequence[measured.Run], said: Callable[[Way], str]) -> None:
    """Puts those ways first that a profile of this machine found the fastest, if it measured the others too."""
    labels = {name: way.label for name, way in choice.first.items()}
    for run in measured.better_than(labels, known):
        best = {name: _labelled(choice.ways[name], run.ways[name]) for name in COMPONENTS}
        if any(way is None or said(way) for way in best.values()):
            continue
        for name, way in best.items():
            assert way is not None
            choice.ways[name].remove(way)
            choice.ways[name].insert(0, way)
        choice.measured = run
        return


def _labelled(ways: Iterable[Way], label: str) -> Way | None:
    return next((way for way in ways if way.label == label), None)


def _able(entries: Sequence[Component], name: str) -> list[tuple[Component, Engine]]:
    able: list[tuple[Component, Engine]] = []
    unknown: EngineError | None = None
    for entry in entries:
        try:
            able += [(entry, engine) for engine in engines_for(entry.format, name)]
        except EngineError as exc:
            unknown = exc
    if not able and unknown is not None:
        raise unknown
    return able


def _devices(entry: Component, engine: Engine, device: str | None, *, insisted: bool) -> list[str]:
    """The devices to try. "auto" is an engine's own choice where the engine is insisted on and has one."""
    if device is not None and (device != AUTO or (insisted and AUTO in engine.devices)):
        return [device] if device in engine.devices else []
    if engine.devices[0] != "cpu":  # the bundle was made for it, wherever it is now
        return [engine.devices[0]]
    with_gpu = "cuda" in engine.devices and has_nvidia_gpu() and not _for_cpus(entry)
    return ["cuda", "cpu"] if with_gpu else ["cpu"]


def _for_cpus(entry: Component) -> bool:
    return getattr(entry, "meta", {}).get("flavour") in FOR_CPUS.get(entry.format, ())


def _not_run(bundle: Bundle, name: str, wanted: Engine | None, able: Sequence[tuple[Component, Engine]]) -> str:
    assert wanted is not None
    formats = " and ".join(dict.fromkeys(entry.format for entry, _ in able))
    return (
        f"{bundle.path}: the {name} is {formats}, which {wanted.name} does not run; engines that do: "
        f"{', '.join(dict.fromkeys(e.name for _, e in able))}. To use {wanted.name}, export the checkpoint to "
        f"{' or '.join(wanted.formats)}"
    )


def engines_used(ways: Mapping[str, Way]) -> list[Engine]:
    """The engines of these ways, each once."""
    return [ENGINES[name] for name in dict.fromkeys(way.engine.name for way in ways.values())]
