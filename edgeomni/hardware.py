"""Hardware profiles (`profiles/<name>.toml`), and what the machine at hand is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from .engines import CHECKPOINT, COMPONENTS, ENGINES, FORMATS
from .errors import GateError, ProfileError, UsageError
from .schema import Source, is_newer, parse_toml, read_bytes, short, typed

PROFILE_SCHEMA = "1.0"
"""Of profiles/*.toml; a profile that states none has this one."""
MOST_BYTES = 1 << 16
"""Of a profile; the shipped ones have 2 KB. The time that TOML takes can grow with the square of the length."""
PRECISIONS = ("fp32", "fp16", "int8", "int4")

Positive = Annotated[float, Meta(gt=0, le=1e12)]
Number = Annotated[int, Meta(ge=1, le=4096)]
"""Of cores or threads."""
Words = Annotated[list[str], Meta(max_length=100)]


@dataclass(frozen=True)
class Device:
    """The vendor's figures, and where they stand. Bandwidth and memory are the CPU's unless they say gpu."""

    reference: str
    kind: str
    cores: Number
    memory_gb: Positive
    bandwidth_gb_s: Positive
    power_w: Positive
    isa: Words
    source: str
    gpu: str | None = None
    gpu_memory_gb: Positive | None = None
    gpu_bandwidth_gb_s: Positive | None = None
    gpu_fp16_tflops: Positive | None = None
    gpu_int8_tops: Positive | None = None
    gpu_power_w: Positive | None = None
    gpu_compute: str | None = None


@dataclass(frozen=True)
class Choice:
    """What a component uses there ("onnx:int8"), out of the precisions and engines that work there."""

    use: str
    precisions: Words
    engines: Words


@dataclass(frozen=True)
class RunChoice:
    engine: str
    device: str
    threads: Number


@dataclass(frozen=True)
class Budgets:
    """Upper bounds: first audio from the end of speech, processing over audio time, process memory, files."""

    ttfa_s: Positive | None = None
    rtf: Positive | None = None
    peak_rss_mb: Positive | None = None
    bundle_mb: Positive | None = None


@dataclass(frozen=True)
class HardwareProfile:
    name: str
    title: str
    matches: Words
    device: Device
    run: RunChoice
    components: dict[str, Choice]
    budgets: Budgets
    schema: str = PROFILE_SCHEMA

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
        source = Source(name, ProfileError, "correct the file")
        return _parse(read_bytes(Path(name), source, MOST_BYTES), Path(name).stem, source)
    if name not in (known := profile_names()):
        raise ProfileError(f"no hardware profile {name!r}; known are {_list(known)}, or give a path to a .toml file")
    raw = (resources.files("edgeomni.profiles") / f"{name}.toml").read_bytes()
    return _parse(raw, name, Source(f"profiles/{name}.toml", ProfileError, "install EdgeOmni again"))


def _parse(raw: bytes, name: str, source: Source) -> HardwareProfile:
    data = parse_toml(raw, source)
    if "name" in data:
        raise source.fault("unknown key(s) $.name (the file's name is the profile's name)")
    newer = is_newer(data.get("schema", PROFILE_SCHEMA), PROFILE_SCHEMA, source)
    profile = typed({**data, "name": name}, HardwareProfile, source, newer=newer)
    if set(profile.components) != set(COMPONENTS):
        raise source.fault(f"must have exactly {_list(COMPONENTS)}", "$.components")
    exporting = [engine for engine in ENGINES.values() if set(engine.formats) - {CHECKPOINT}]
    if profile.run.engine not in (names := [engine.name for engine in exporting]):
        raise source.fault(f"{short(profile.run.engine)} runs no exported format; known are {_list(names)}", _ENGINE)
    for part in COMPONENTS:
        _check_choice(profile.components[part], part, names, source)
    return profile


_ENGINE = "$.run.engine"


def _check_choice(choice: Choice, part: str, engines: list[str], source: Source) -> None:
    """Raises ProfileError unless the chosen format and precision are among what the section lists."""
    path = f"$.components.{part}"
    if unknown := [engine for engine in choice.engines if engine not in engines]:
        raise source.fault(
            f"{short(unknown[0])} runs no exported format; known are {_list(engines)}", f"{path}.engines"
        )
    if unknown := [precision for precision in choice.precisions if precision not in PRECISIONS]:
        raise source.fault(f"{short(unknown[0])} is no precision; known are {_list(PRECISIONS)}", f"{path}.precisions")
    kind, _, precision = choice.use.partition(":")
    runs = [e for e in choice.engines if kind in ENGINES[e].formats and part in ENGINES[e].components]
    if kind not in FORMATS or not runs:
        raise source.fault(
            f"no engine listed there runs {short(choice.use)}; formats are {_list(FORMATS)}", f"{path}.use"
        )
    if precision not in choice.precisions:
        raise source.fault(
            f"{short(choice.use)} is none of the precisions listed there, {_list(choice.precisions)}", f"{path}.use"
        )


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


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
    isa = tuple(ours for kernel_name, ours in _ISA.items() if kernel_name in flags)
    board = _first_line(Path("/proc/device-tree/model"))
    return Machine(platform.platform(terse=True), cpu_name(), cores(), isa, _memory_gb(), _gpu(), board)


def cores() -> int:
    """The logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU as the system calls it ("AMD EPYC")."""
    return (_cpuinfo().get("model name") or platform.processor() or platform.machine()).strip()


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


_NVIDIA = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
"""What a driver of NVIDIA leaves: on Linux, on Jetson (the third and fourth), under Windows' Linux (the last)."""


def has_nvidia_gpu() -> bool:
    """Whether the system shows a GPU of NVIDIA. Costs nothing: no library is loaded and no process started."""
    return any(os.path.exists(path) for path in _NVIDIA) or (os.name == "nt" and shutil.which("nvidia-smi") is not None)


@cache
def gpu_name() -> str:
    """The GPUs as nvidia-smi calls them, "" where it finds none. Asked once in a process."""
    return (_gpu() or "") if has_nvidia_gpu() else ""


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
