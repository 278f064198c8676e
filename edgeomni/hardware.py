"""Hardware profiles (`profiles/<name>.toml`), and what the machine at hand is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from .engines import COMPONENTS, ENGINES, FORMATS
from .errors import GateError, ProfileError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16", "int8", "int4")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Device:
    """The vendor's figures, and where they stand. Bandwidth and memory are the CPU's unless they say gpu."""

    reference: str
    kind: str
    cores: int
    memory_gb: float
    bandwidth_gb_s: float
    power_w: float
    isa: list[str]
    source: str
    gpu: str | None = None
    gpu_memory_gb: float | None = None
    gpu_bandwidth_gb_s: float | None = None
    gpu_fp16_tflops: float | None = None
    gpu_int8_tops: float | None = None
    gpu_power_w: float | None = None
    gpu_compute: str | None = None


@dataclass(frozen=True)
class Choice:
    """What a component uses there ("onnx:int8"), out of the precisions and engines that work there."""

    use: str
    precisions: list[str]
    engines: list[str]


@dataclass(frozen=True)
class RunChoice:
    engine: str
    device: str
    threads: int


@dataclass(frozen=True)
class Budgets:
    """Upper bounds: first audio from the end of speech, processing over audio time, process memory, files."""

    ttfa_s: float | None = None
    rtf: float | None = None
    peak_rss_mb: float | None = None
    bundle_mb: float | None = None


@dataclass(frozen=True)
class HardwareProfile:
    name: str
    title: str
    matches: list[str]
    device: Device
    run: RunChoice
    components: dict[str, Choice]
    budgets: Budgets

    def choices(self) -> dict[str, str]:
        """Component -> "format:precision", as `export --encoder/--llm/--codec` take them."""
        return {name: choice.use for name, choice in self.components.items()}

    def missed(self, figures: dict[str, float | None]) -> list[str]:
        """One sentence per budget that `figures` (same names as Budgets) exceed; an unknown figure misses nothing."""
        return [
            f"{f.name} is {value:.3g}, the budget of {self.name} is {limit:g}"
            for f in fields(Budgets)
            if (limit := getattr(self.budgets, f.name)) is not None
            and (value := figures.get(f.name)) is not None
            and value > limit
        ]

    def judge(self, figures: dict[str, float | None]) -> None:
        """Raises GateError (exit 3) that names every missed budget."""
        if missed := self.missed(figures):
            raise GateError("budget missed: " + "; ".join(missed))


def profile_names() -> list[str]:
    folder = resources.files("edgeomni.profiles")
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_profile(name: str) -> HardwareProfile:
    """A shipped profile by name, or any file by its path (ending in .toml).

    Raises ProfileError that names the file and the key at fault.
    """
    if name.endswith(".toml"):
        return _parse(_read(Path(name)), Path(name).stem, name)
    if name not in (known := profile_names()):
        raise ProfileError(f"no hardware profile {name!r}; known are {_list(known)}, or give a path to a .toml file")
    text = (resources.files("edgeomni.profiles") / f"{name}.toml").read_text(encoding="utf-8")
    return _parse(text, name, f"profiles/{name}.toml")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ProfileError(f"{path}: cannot be read ({exc}); check the path") from exc


def _parse(text: str, name: str, where: str) -> HardwareProfile:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ProfileError(f"{where}: not valid TOML ({exc})") from exc
    sections = {"device": Device, "run": RunChoice, "budgets": Budgets}
    for key, cls in sections.items():
        data[key] = _section(cls, data.get(key), f"{where}: [{key}]")
    parts = data.get("components")
    if not isinstance(parts, dict) or set(parts) != set(COMPONENTS):
        raise ProfileError(f"{where}: [components] must have exactly {', '.join(COMPONENTS)}")
    data["components"] = {k: _choice(v, f"{where}: [components.{k}]") for k, v in parts.items()}
    profile = _section(HardwareProfile, {**data, "name": name}, where)
    if profile.run.engine not in ENGINES:
        raise ProfileError(f"{where}: [run] engine {profile.run.engine!r}; known are {', '.join(ENGINES)}")
    return profile


def _choice(data: Any, where: str) -> Choice:
    choice = _section(Choice, data, where)
    kind, _, precision = choice.use.partition(":")
    if kind not in FORMATS or not any(kind in ENGINES[e].formats for e in choice.engines if e in ENGINES):
        raise ProfileError(f"{where} use {choice.use!r}: no engine listed here runs it; formats: {_list(FORMATS)}")
    if precision not in choice.precisions or set(choice.precisions) - set(PRECISIONS):
        raise ProfileError(f"{where} precisions must be of {_list(PRECISIONS)} and hold {precision!r}")
    if unknown := set(choice.engines) - set(ENGINES):
        raise ProfileError(f"{where} engines: unknown {_list(sorted(unknown))}; known are {_list(ENGINES)}")
    return choice


def _list(names: Any) -> str:
    return ", ".join(names)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "list[str]": (list,),
    "dict": (dict,),
}


def _section(cls: type[_T], data: Any, where: str) -> _T:
    """dict -> dataclass; unknown, missing and ill-typed keys are named."""
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: the section is missing")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(known)):
        raise ProfileError(f"{where}: unknown key(s) {_list(unknown)}; known are {_list(sorted(known))}")
    if missing := sorted(k for k, f in known.items() if f.default is MISSING and k not in data):
        raise ProfileError(f"{where}: missing key(s) {_list(missing)}")
    for key, value in data.items():
        kinds = _KINDS.get(str(known[key].type).removesuffix(" | None"))
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ProfileError(f"{where}: key {key} must be {known[key].type}, not {value!r}")
        if isinstance(value, (int, float)) and not value > 0:
            raise ProfileError(f"{where}: key {key} must be above 0, not {value!r}")
    return cls(**data)


def most_threads() -> int:
    """The most threads that an engine may be asked to compute with: four per logical CPU, at least 64."""
    return max(64, 4 * (os.cpu_count() or 1))


def check_threads(threads: int | None) -> None:
    """Raises UsageError for a number of threads out of range; None leaves it to the engine.

    An engine that is asked for 100000 threads takes the machine down, or aborts the process.
    """
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most_threads():
        raise UsageError(f"threads must be a whole number from 1 to {most_threads()} here, not {threads!r}")


@dataclass(frozen=True)
class Machine:
    """What this machine is. `isa` holds the vector extensions that matter for inference."""

    system: str
    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory_gb: float | None
    gpu: str | None
    board: str | None

    @property
    def label(self) -> str:
        """Short name for files: "amd-epyc-2c"."""
        words = "".join(c if c.isalnum() else " " for c in (self.board or self.cpu).lower()).split()
        skip = {"r", "tm", "cpu", "processor", "nvidia", "developer", "kit"}
        return "-".join([w for w in words if w not in skip][:4] + [f"{self.cores}c"])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "isa": list(self.isa)}


_ISA = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
}


def detect() -> Machine:
    """Reads /proc where there is one; never fails for lack of it."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    cpu = info.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    isa = tuple(ours for kernel_name, ours in _ISA.items() if kernel_name in flags)
    board = _first_line(Path("/proc/device-tree/model"))
    return Machine(platform.platform(terse=True), cpu.strip(), cores, isa, _memory_gb(), _gpu(), board)


def closest_profile(machine: Machine) -> str | None:
    """Name of the shipped profile that fits best: by board or GPU name first, then by instruction sets."""
    names = f"{machine.board or ''} {machine.gpu or ''}".lower()
    profiles = [load_profile(n) for n in profile_names()]
    by_name = [p for p in profiles if p.device.kind != "cpu" and any(m in names for m in p.matches)]
    by_isa = [p for p in profiles if p.device.kind == "cpu" and set(p.matches) <= set(machine.isa)]
    best = by_name or sorted(by_isa, key=lambda p: -len(p.matches))
    return best[0].name if best else None


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(out.split("\n")).strip("; ") or None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
