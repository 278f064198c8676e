"""Builds TensorRT engines from ONNX graphs in a child process, with whichever of the two TensorRT packages there is.

`tensorrt_rtx` (PyPI: tensorrt-rtx) builds for desktop GPUs without having one; `tensorrt` (JetPack's, or a wheel)
builds for the GPU that it runs on. The child (tensorrt_child.py) may crash or run out of memory: this process survives,
and says what happened. Neither torch nor onnx is needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ExportError
from .install_hint import install_command
from .tensorrt_targets import DISTRIBUTIONS, PACKAGES, TARGETS

Say = Callable[[str], None]
MARK = "edgeomni-tensorrt "
"""What a line of the child's output begins with if it is for this process; libraries may print others."""
TIMEOUT_S = 3 * 3600.0
"""A Jetson takes long; a build that has not ended by then never will."""
_BASE_BYTES = 450 << 20
_TIMES_GRAPH = 4.5
"""Memory that a build takes: so much, and so many times the graph's files. Measured (docs/tensorrt.md)."""
_TAIL = 400


@dataclass(frozen=True)
class Recipe:
    """How an engine is built from its graph: all of it stands in the manifest, so that a device can build it again.

    `profiles`: for each optimization profile, input -> its least, usual and largest shape. A graph whose shapes are all
    fixed has none. `tf32`: whether float32 products may round their inputs to 10 bits of mantissa.
    """

    profiles: list[dict[str, list[list[int]]]] = field(default_factory=list)
    tf32: bool = False


@dataclass(frozen=True)
class Built:
    """What a build took: `peak_bytes` of memory, `seconds`; by which package of which version."""

    package: str
    version: str
    seconds: float
    peak_bytes: int


def installed() -> tuple[str, ...]:
    """The TensorRT packages that this Python finds, in order of PACKAGES."""
    return tuple(name for name in PACKAGES if find_spec(name) is not None)


def predicted_bytes(onnx: Path) -> int:
    """About how much memory building this graph's engine takes."""
    return int(_BASE_BYTES + _TIMES_GRAPH * _graph_bytes(onnx))


def build_engine(
    onnx: Path,
    out: Path,
    recipe: Recipe,
    targets: Sequence[str] = (),
    *,
    package: str | None = None,
    progress: Say = lambda _: None,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int | None = None,
) -> Built:
    """Builds the engine of the graph `onnx`, renamed to `out` when it is whole.

    `targets`: the GPUs to build for; none means this machine's. `memory_bytes` bounds the child's address space. Raises
    ExportError for a package that is not there, for too little memory, for an operator that TensorRT refuses (with the
    node), and where the child crashes, is killed, or takes longer than `timeout_s`.
    """
    chosen = _package(package, targets)
    _check_memory(onnx, progress)
    part = out.with_name(out.name + ".part")
    request = {
        "onnx": os.fspath(onnx),
        "out": os.fspath(part),
        "package": chosen,
        "capabilities": [TARGETS[name].number for name in targets],
        "recipe": asdict(recipe),
        "memory_bytes": memory_bytes,
    }
    try:
        answer = _run(request, onnx.name, progress, timeout_s)
        if "error" in answer:
            raise ExportError(_refusal(answer["error"], chosen, onnx.name))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return Built(chosen, answer["version"], answer["seconds"], answer["peak_bytes"])


def _package(wanted: str | None, targets: Sequence[str]) -> str:
    """The package to build with. Raises ExportError where it is not installed."""
    names = (wanted,) if wanted else ("tensorrt_rtx",) if targets else PACKAGES
    found = [name for name in names if name in installed()]
    if not found:
        extra = "tensorrt" if names[0] == "tensorrt_rtx" else "jetson"
        raise ExportError(
            f"building TensorRT engines needs {' or '.join(DISTRIBUTIONS[name] for name in names)}, which is not "
            f"installed: {install_command(extra)}; or leave --target out: the first run on the device builds then"
        )
    return found[0]


def _graph_bytes(onnx: Path) -> int:
    beside = onnx.with_name(onnx.name + ".data")
    return onnx.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def _check_memory(onnx: Path, progress: Say) -> None:
    """Says what the build will take. Raises ExportError where the machine has less than half of that."""
    needed, free = predicted_bytes(onnx), _available_bytes()
    progress(f"build {onnx.name}: about {needed / 1e9:.1f} GB of memory")
    if free is not None and free < needed / 2:
        raise ExportError(
            f"building the engine of {onnx.name} takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            "are free; close other programs, add swap, or build on another machine with "
            "`edgeomni export --format tensorrt --target ...` and copy the bundle"
        )


def _available_bytes() -> int | None:
    """Memory and swap that are free; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _run(request: dict[str, Any], name: str, progress: Say, timeout_s: float) -> dict[str, Any]:
    """The child's answer. Raises ExportError where it gave none."""
    with tempfile.TemporaryDirectory(prefix="edgeomni-") as scratch:
        path, errors = Path(scratch) / "request.json", Path(scratch) / "stderr"
        path.write_text(json.dumps(request), encoding="utf-8")
        answer, parsing = dict[str, Any](), ""
        with errors.open("wb") as err, _child([str(path)], err, timeout_s) as (child, late):
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith(MARK):
                    continue
                message = json.loads(line.removeprefix(MARK))
                parsing = message.get("node", parsing)
                if "progress" in message:
                    progress(f"{name}: {message['progress']}")
                if "error" in message or "version" in message:
                    answer = message
            code = child.wait()
        tail = errors.read_bytes()[-_TAIL:].decode("utf-8", "replace").strip()
    if late.is_set():
        raise ExportError(f"building the engine of {name} took longer than {timeout_s:.0f} s and was ended; try again")
    if not answer or (code and "error" not in answer):
        raise ExportError(_crash(code, name, parsing, tail))
    return answer


@contextmanager
def _child(
    arguments: list[str], errors: Any, timeout_s: float
) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """The running child, and an event that tells whether it was ended for being late. It never outlives the block."""
    command = [sys.executable, "-m", "edgeomni.tensorrt_child", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
    child = subprocess.Popen(command, text=True, encoding="utf-8", errors="replace", **pipes)
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        yield child, late
    finally:
        timer.cancel()
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _crash(code: int, name: str, parsing: str, tail: str) -> str:
    where = f" while it read node {parsing}" if parsing else ""
    if code == -signal.SIGKILL or "bad_alloc" in tail or "MemoryError" in tail:
        return (
            f"building the engine of {name} ran out of memory{where}; build on a machine with more, with "
            "`edgeomni export --format tensorrt --target ...`, and copy the bundle"
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said = f" ({tail.splitlines()[-1]})" if tail else ""
    return (
        f"TensorRT crashed ({how}) building the engine of {name}{where}{said}; export that component to ONNX "
        "(--encoder, --llm or --codec onnx:PRECISION), or try another precision"
    )


def _refusal(error: dict[str, str], package: str, name: str) -> str:
    node = f"node {error['node']} " if error.get("node") else ""
    return (
        f"{package} cannot build {name}: {node}{error['text']}; try another precision, or export that component "
        "to ONNX (--encoder, --llm or --codec onnx:PRECISION)"
    )
