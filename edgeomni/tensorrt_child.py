"""Builds one TensorRT engine and ends: `python -m edgeomni.tensorrt_child REQUEST.json`, started by tensorrt_builder.

Imports TensorRT, which may end this process at any time. What the parent should know is printed as one JSON object per
line behind MARK.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from .tensorrt_builder import MARK

_PARSED = re.compile(r"Parsing node: (.+)")
_LONGEST = 300


class Refused(Exception):
    """TensorRT does not take the graph: the node, where it tells, and why."""

    def __init__(self, text: str, node: str = "") -> None:
        super().__init__(text)
        self.text, self.node = text, node


def main(path: str) -> int:
    """0 when the engine is written, 1 when TensorRT refused. What aborts TensorRT ends the process."""
    request = json.loads(Path(path).read_bytes())
    _be_the_first_to_go()
    if request["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"],) * 2)
    start = time.perf_counter()
    try:
        trt = import_module(request["package"])
        _build(trt, request)
    except ImportError as exc:
        tell(error={"text": f"cannot be loaded ({exc})", "node": ""})
        return 1
    except Refused as exc:
        tell(error={"text": exc.text[:_LONGEST], "node": exc.node})
        return 1
    tell(version=str(trt.__version__), seconds=time.perf_counter() - start, peak_bytes=_peak_bytes())
    return 0


def tell(**message: Any) -> None:
    print(MARK + json.dumps(message), flush=True)


def _peak_bytes() -> int:
    """The most memory that this process had; 0 where the system does not tell. (ru_maxrss would count its parent's.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def _be_the_first_to_go() -> None:
    """Where memory runs out, the system ends this process before any other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _build(trt: Any, request: dict[str, Any]) -> None:
    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # newer versions know nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(trt, network, logger, request["onnx"])
    config = builder.create_builder_config()
    _set_capabilities(trt, config, request["capabilities"], request["package"])
    if not request["recipe"]["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # without it CUDA graph capture is not promised
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.progress_monitor = monitor = _monitor(trt)
    for shapes in request["recipe"]["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(usual), tuple(largest))
        if config.add_optimization_profile(profile) < 0:
            raise Refused(f"takes no such profile: {shapes}; {logger.first()}")
    engine = builder.build_serialized_network(network, config)
    del monitor
    if engine is None:
        raise Refused(logger.first() or "the builder gave no engine and no reason")
    Path(request["out"]).write_bytes(memoryview(engine))


def _parse(trt: Any, network: Any, logger: Any, onnx: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(onnx):
        return
    if not parser.num_errors:
        raise Refused(logger.first() or "the parser gave no reason")
    error = parser.get_error(0)
    node, kind = (str(getattr(error, name, lambda: "")()) for name in ("node_name", "node_operator"))
    raise Refused(" ".join(str(error.desc()).split()), " ".join(part for part in (node or logger.node, kind) if part))


def _set_capabilities(trt: Any, config: Any, numbers: list[int], package: str) -> None:
    """The GPUs to build for; TensorRT for RTX is told even if it is this machine's."""
    if package != "tensorrt_rtx":
        return
    names = [f"SM{number}" for number in numbers] or ["CURRENT"]
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        if not hasattr(trt.ComputeCapability, name):
            raise Refused(f"{trt.__version__} knows no target {name.lower()}")
        if config.set_compute_capability(getattr(trt.ComputeCapability, name), i) is False:
            raise Refused(f"does not build for {name.lower()}")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors, and the node that is being parsed, which the parent is told in case of a crash."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.node = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(" ".join(message.split()))
            elif match := _PARSED.search(message):
                self.node = match[1]
                tell(node=self.node)

        def first(self) -> str:
            return self.errors[0] if self.errors else ""

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Tells the outermost phases of a build."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if steps := self.steps.get(phase_name):
                tell(progress=f"{phase_name.lower()}, step {step + 1} of {steps}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
