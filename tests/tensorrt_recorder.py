"""A strict recorder in the place of `tensorrt` or `tensorrt_rtx`, on top of cuda_recorder.Recorder.

An engine of it is a small file that names an ONNX graph, its optimization profiles, and what GPU and version it is for.
Running it computes that graph with ONNX Runtime on the CPU, from the bytes that lie at the addresses bound, into the
bytes at the others. Refused with ProtocolError: shapes or addresses that are not set, shapes outside the profile,
buffers that are too short, on the wrong side or not aligned, an output over an input that it is no alias of, scratch
memory that is missing or in use elsewhere, and a capture before a first run.
"""

from __future__ import annotations

import enum
import hashlib
import json
import sys
import types
import weakref
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cuda_recorder import ALIGNMENT, Operation, ProtocolError, Recorder
from numpy.typing import NDArray
from tensorrt_building import MAGIC, offer_builder

SCRATCH = 4096
_DTYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
}


class _DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64, INT8, BOOL, BF16 = range(7)


class _Mode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class _Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class _Specialization(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class _Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _ILogger:
    Severity = _Severity

    def log(self, severity: _Severity, message: str) -> None:
        raise NotImplementedError


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
        self.living: weakref.WeakSet[Any] = weakref.WeakSet()

    def module(self) -> types.ModuleType:
        made = types.ModuleType(self.name)
        module: Any = made
        module.__spec__ = ModuleSpec(self.name, None)
        module.__version__ = self.version
        module.ILogger, module.DataType, module.TensorIOMode = _ILogger, _DataType, _Mode
        module.ExecutionContextAllocationStrategy = _Strategy
        if self.name == "tensorrt_rtx":
            module.DynamicShapesKernelSpecializationStrategy = _Specialization
        recorder = self
        offer_builder(module, self.name, self.version)

        class Runtime:
            def __init__(self, logger: _ILogger) -> None:
                if not isinstance(logger, _ILogger):
                    raise TypeError("Runtime takes an ILogger")
                self._logger = logger

            def deserialize_cuda_engine(self, data: Any) -> _Engine | None:
                return recorder.deserialized(bytes(data), self._logger)

        module.Runtime = Runtime
        return made

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, self.name, self.module())

    def deserialized(self, data: bytes, logger: _ILogger) -> _Engine | None:
        self.cuda.note("deserialize_cuda_engine")
        text = data[len(MAGIC) + 32 :]
        if self.refuses or not data.startswith(MAGIC) or hashlib.sha256(text).digest() != data[len(MAGIC) :][:32]:
            logger.log(_Severity.ERROR, "Serialization assertion magicTag == expected failed")
            return None
        facts = json.loads(text)
        here = f"sm_{self.cuda.sm[0]}{self.cuda.sm[1]}"
        if facts["version"] != self.version or here not in facts["sms"]:
            logger.log(_Severity.ERROR, f"made for {facts['version']} {facts['sms']}, here {self.version} {here}")
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

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name in self.inputs else _Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> _DataType:
        return _DataType[_DTYPES[self.ports[name].type][0]]

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

    def create_execution_context(self, how: Any) -> _Context:
        strategy = how.strategy if isinstance(how, _Config) else how
        if strategy is not _Strategy.USER_MANAGED:
            raise ProtocolError(f"a context with {strategy}, whose memory nobody has counted")
        return _Context(self, how.cache if isinstance(how, _Config) else None)


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


class _Context:
    def __init__(self, engine: _Engine, kernels: _RuntimeCache | None) -> None:
        self._kernels = kernels
        self._engine, self._cuda = engine, engine.tensorrt.cuda
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._ran_with: dict[str, tuple[int, ...]] | None = None
        self._sizes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        engine.tensorrt.living.add(self)

    def set_device_memory(self, address: int, size: int) -> None:
        if address % ALIGNMENT or size < SCRATCH:
            raise ProtocolError(f"scratch memory of {size} bytes at {address:#x}; {SCRATCH} aligned ones are needed")
        self._cuda.span(address, size, "device", "scratch memory")
        self._scratch = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile, self._shapes = profile, {}
        return 0 <= profile < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._engine.inputs or -1 not in self._engine.get_tensor_shape(name):
            raise ProtocolError(f"{name} is no input of varying shape")
        least, _, most = self._engine.profiles[self._profile][name]
        if len(shape) != len(least) or not all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {**self._input_shapes(), **self._output_shapes()}[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.ports:
            return False
        if address % ALIGNMENT:
            raise ProtocolError(f"{name} at {address:#x} is not aligned")
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._cuda.note("execute_async_v3 " + " ".join(f"{n}{list(s)}" for n, s in self._shapes.items()))
        inputs, outputs = self._input_shapes(), self._output_shapes()
        if self._kernels is not None and (shapes := str(sorted(inputs.items()))) not in self._kernels.shapes:
            self._cuda.note("compile")
            self._kernels.shapes.add(shapes)
        if missing := [n for n in self._engine.ports if not self._addresses.get(n)]:
            raise ProtocolError(f"no address for {missing}")
        if self._cuda.is_capturing(stream) and self._ran_with != inputs:
            raise ProtocolError("captured before a first run with these shapes")
        addresses, scratch, engine = dict(self._addresses), self._scratch, self._engine

        cuda, here = self._cuda, weakref.ref(self)

        def views(shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
            if (context := here()) is None:
                raise ProtocolError("the execution context of waiting or captured work is gone")
            return {n: context._view(n, addresses[n], shape) for n, shape in shapes.items()}

        def check() -> None:
            cuda.span(*scratch, "device", "scratch memory")
            _check_aliases(views(inputs), views(outputs))

        def run() -> None:
            feed = {n: np.array(v) for n, v in views(inputs).items()}
            given = engine.session.run(list(outputs), feed)
            for into, value in zip(views(outputs).values(), given, strict=True):
                into[...] = value
            if (context := here()) is not None:
                context._ran_with = inputs

        self._cuda.enqueue(stream, Operation("engine", check, run))
        return True

    def _view(self, name: str, address: int, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(_DTYPES[self._engine.ports[name].type][1])
        size = int(np.prod(shape)) * dtype.itemsize
        return self._cuda.span(address, size, "device", f"tensor {name}").view(dtype).reshape(shape)

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for name in self._engine.inputs:
            shape = self._shapes.get(name, self._engine.get_tensor_shape(name))
            if -1 in shape:
                raise ProtocolError(f"the shape of {name} is not set")
            shapes[name] = shape
        return shapes

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the graph gives for zeros of the shapes set."""
        inputs = self._input_shapes()
        key = tuple(inputs.items())
        if key not in self._sizes:
            kinds = {n: _DTYPES[p.type][1] for n, p in self._engine.inputs.items()}
            feed = {n: np.zeros(shape, kinds[n]) for n, shape in inputs.items()}
            given = self._engine.session.run(list(self._engine.outputs), feed)
            self._sizes[key] = {n: v.shape for n, v in zip(self._engine.outputs, given, strict=True)}
        return self._sizes[key]


def _check_aliases(inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
    """TensorScatter writes in place: a cache's output must be its input's memory, and nothing else may overlap."""
    for out, target in outputs.items():
        source = out.replace("present_", "past_")
        if source in inputs and source != out and target.ctypes.data != inputs[source].ctypes.data:
            raise ProtocolError(f"{out} is not where {source} is, but TensorRT updates caches in place")
        for name, value in inputs.items():
            if name != source and np.shares_memory(target, value):
                raise ProtocolError(f"{out} overlaps the input {name}")
