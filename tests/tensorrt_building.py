"""The building side of the recorded TensorRT: graphs become recorded engines, which tensorrt_recorder.py runs.

`tensorrt_child` drives it in a process of its own. What the environment's RECORDED_BUILDER says happens there.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAGIC = b"RECORDED ENGINE\n"
Profile = Mapping[str, Sequence[Sequence[int]]]


def engine_bytes(
    graph: Path, profiles: Sequence[Profile], *, sms: Sequence[str] = ("sm_89",), version: str = "1.7.1.116"
) -> bytes:
    """A recorded engine of an ONNX graph. A profile maps an input to its least, usual and largest shape."""
    facts = {"graph": str(graph), "profiles": profiles, "sms": list(sms), "version": version}
    text = json.dumps(facts).encode()
    return MAGIC + hashlib.sha256(text).digest() + text


class _Capability(enum.Enum):
    CURRENT = "sm_89"
    SM86 = "sm_86"
    SM89 = "sm_89 "


class _Flag(enum.Enum):
    TF32, REQUIRE_USER_ALLOCATION = range(2)


class _Creation(enum.IntEnum):
    STRONGLY_TYPED = 1


class _Monitor:
    pass


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, least: Any, usual: Any, largest: Any) -> None:
        self.shapes[name] = [list(least), list(usual), list(largest)]


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.capabilities: dict[int, _Capability] = {}
        self.num_compute_capabilities = 0
        self.progress_monitor: Any = None

    def clear_flag(self, flag: _Flag) -> None: ...

    def set_flag(self, flag: _Flag) -> None: ...

    def set_compute_capability(self, capability: _Capability, index: int) -> bool:
        self.capabilities[index] = capability
        return True

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _Network:
    graph: Path | None = None


def offer_builder(module: Any, name: str, version: str) -> None:
    """Puts the classes that build into the module of a package."""

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> _Network:
            return _Network()

        def create_builder_config(self) -> _Config:
            return _Config()

        def create_optimization_profile(self) -> _Profile:
            return _Profile()

        def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
            fate = os.environ.get("RECORDED_BUILDER")
            if fate == "crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fate == "refuses" or network.graph is None:
                self._logger.log(module.ILogger.Severity.ERROR, "no kernel for node 7")
                return None
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building", None, 2)
                config.progress_monitor.step_complete("Building", 0)
                config.progress_monitor.step_complete("Building", 1)
                config.progress_monitor.phase_finish("Building")
            sms = [c.value.strip() for c in config.capabilities.values()] or ["sm_89"]
            return engine_bytes(network.graph, [p.shapes for p in config.profiles], sms=sms, version=version)

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: _Network, logger: Any) -> None:
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            self._network.graph = Path(path)
            return Path(path).is_file()

    module.Builder, module.OnnxParser = Builder, OnnxParser
    module.BuilderFlag, module.NetworkDefinitionCreationFlag = _Flag, _Creation
    module.IProgressMonitor = _Monitor
    if name == "tensorrt_rtx":
        module.ComputeCapability = _Capability
