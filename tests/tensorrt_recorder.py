"""A strict recorder in the place of `tensorrt` or `tensorrt_rtx`, on top of cuda_recorder.Recorder.

An engine of it is a small file that names an ONNX graph, its optimization profiles, and what GPU and version it is for.
Running it computes that graph with ONNX Runtime on the CPU, from the bytes that lie at the addresses bound, into the
bytes at the others. Refused with ProtocolError: shapes or addresses that are not set, shapes outside the profile,
buffers that are too short, on the wrong side or not aligned, an output over an input that it is no alias of, scratch
memory that is missing or in use elsewhere, a capture before a first run or while a profile is being switched, changes
of a context that a graph was captured from, and calls in a thread without a device.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import onnxruntime as ort
import pytest
import tensorrt_kinds as kinds
from cuda_recorder import ProtocolError, Recorder
from tensorrt_building import MAGIC, offer_builder
from tensorrt_context import DTYPES, SCRATCH, Context

CURRENT: Recorder | None = None
"""The CUDA that a package installed as a folder runs on (`package`)."""


def package(name: str) -> types.ModuleType:
    """What `import tensorrt_rtx` gives where a test has put a package of that name on the path, in any process."""
    return TensorRT(CURRENT or Recorder(), name).module()


class TensorRT:
    """The package. `living` holds the execution contexts that are alive."""

    def __init__(self, cuda: Recorder, name: str = "tensorrt_rtx", version: str = "1.7.1.116") -> None:
        self.cuda, self.name, self.version = cuda, name, version
        self.refuses = False
        self.on_host: set[str] = set()
        """Tensors that engines say the host must hold."""
        self.while_captured: Callable[[], None] = lambda: None
        """Called when an engine's run is captured."""
        self.living: weakref.WeakSet[Any] = weakref.WeakSet()

    def module(self) -> types.ModuleType:
        made = types.ModuleType(self.name)
        module: Any = made
        module.__spec__ = ModuleSpec(self.name, None)
        module.__version__ = self.version
        names = ["ILogger", "DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy"]
        for name in names + ["DynamicShapesKernelSpecializationStrategy"] * (self.name == "tensorrt_rtx"):
            setattr(module, name, getattr(kinds, name))
        recorder = self
        offer_builder(module, self.name, self.version)

        class Runtime:
            def __init__(self, logger: kinds.ILogger) -> None:
                if not isinstance(logger, kinds.ILogger):
                    raise TypeError("Runtime takes an ILogger")
                self._logger = logger

            def deserialize_cuda_engine(self, data: Any) -> _Engine | None:
                return recorder.deserialized(bytes(data), self._logger)

        module.Runtime = Runtime
        return made

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, self.name, self.module())

    def deserialized(self, data: bytes, logger: kinds.ILogger) -> _Engine | None:
        self.cuda.note("deserialize_cuda_engine")
        text = data[len(MAGIC) + 32 :]
        if self.refuses or not data.startswith(MAGIC) or hashlib.sha256(text).digest() != data[len(MAGIC) :][:32]:
            logger.log(kinds.ILogger.Severity.ERROR, "Serialization assertion magicTag == expected failed")
            return None
        facts = json.loads(text)
        here = f"sm_{self.cuda.sm[0]}{self.cuda.sm[1]}"
        if facts["version"] != self.version or here not in facts["sms"]:
            logger.log(
                kinds.ILogger.Severity.ERROR, f"made for {facts['version']} {facts['sms']}, here {self.version} {here}"
            )
            return None
        return _Engine(self, facts)


class _Engine:
    def __init__(self, tensorrt: TensorRT, facts: dict[str, Any]) -> None:
        self.tensorrt, self.profiles = tensorrt, facts["profiles"]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(facts["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.ports = {**self.inputs, **self.outputs}
        self.num_io_tensors, self.num_optimization_profiles = len(self.ports), max(1, len(self.profiles))
        self.device_memory_size_v2 = SCRATCH

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.ports)[index])

    def get_tensor_mode(self, name: str) -> kinds.TensorIOMode:
        return kinds.TensorIOMode.INPUT if name in self.inputs else kinds.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> kinds.TensorLocation:
        return kinds.TensorLocation.HOST if name in self.tensorrt.on_host else kinds.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> kinds.DataType:
        return kinds.DataType[DTYPES[self.ports[name].type][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        ranges = [p[name] for p in self.profiles if name in p]  # TensorRT keeps -1 only where a profile varies
        shape = self.ports[name].shape
        fixed = [all(least[i] == most[i] == ranges[0][0][i] for least, _, most in ranges) for i in range(len(shape))]
        sizes = ranges[0][0] if ranges else shape
        return tuple(
            s if isinstance(s, int) else (int(sizes[i]) if ranges and fixed[i] else -1) for i, s in enumerate(shape)
        )

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        if name not in self.profiles[profile]:
            raise ProtocolError(f"profile {profile} says nothing of {name}")
        return [tuple(shape) for shape in self.profiles[profile][name]]

    def create_runtime_config(self) -> Any:
        if self.tensorrt.name != "tensorrt_rtx":
            raise AttributeError("create_runtime_config")
        return _Config()

    def create_execution_context(self, how: Any) -> Context:
        self.tensorrt.cuda.note("create_execution_context")
        strategy = how.strategy if isinstance(how, _Config) else how
        if strategy is not kinds.ExecutionContextAllocationStrategy.USER_MANAGED:
            raise ProtocolError(f"a context with {strategy}, whose memory nobody has counted")
        return Context(self, how.cache if isinstance(how, _Config) else None)


class _RuntimeCache:
    """Compiled kernels: here the shapes that were run."""

    def __init__(self) -> None:
        self.shapes: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        self.shapes = set(json.loads(blob))
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.shapes)).encode()


class _Config:
    strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None
    cache: _RuntimeCache | None = None

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache()

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy
