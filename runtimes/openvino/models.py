"""OpenVINO's compiled models as EdgeOmni wants them: float32 between layers, no pinned threads, errors translated."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.component_meta import OpenVinoArithmetic
from edgeomni.engines import ENGINES
from edgeomni.errors import EngineError
from edgeomni.hardware import check_threads
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.openvino_library import ov

_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU", "auto": "AUTO"}
_LOAD_REMEDY = "verify the bundle with `edgeomni verify`, export it again, or update OpenVINO"
_RUN_REMEDY = "check memory, or verify the bundle with `edgeomni verify`"
FLOAT32 = OpenVinoArithmetic()
"""Left to itself, OpenVINO would compute in bfloat16 where a CPU has it, and keep keys and values in 8 bits."""


class ModelFactory:
    """Opens every model of a component alike, on one of OpenVINO's devices.

    `threads`: None for all physical cores. Between layers all is float32 unless `arithmetic` has another type; with its
    `int8_inputs`, kernels of compressed layers may round their inputs to 8 bits ("dynamic quantization"). A CPU that
    has neither computes as if they had not been asked for. Raises EngineError for a device that is not there,
    UsageError for a number of threads out of range.
    """

    def __init__(
        self, threads: int | None = None, device: str = "cpu", arithmetic: OpenVinoArithmetic = FLOAT32
    ) -> None:
        check_threads(threads)
        self.device, self.threads = _device(device), threads
        self._asked = device, arithmetic
        wanted: dict[str, Any] = {"INFERENCE_PRECISION_HINT": arithmetic.compute, "KV_CACHE_PRECISION": "f32"}
        if not arithmetic.int8_inputs:
            wanted["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        wanted |= {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        if threads:
            wanted |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_HYPER_THREADING": True}
        self.properties = _properties(self.device, wanted)

    def with_threads(self, threads: int) -> ModelFactory:
        """The same with so many threads."""
        return ModelFactory(threads, *self._asked)

    def open(self, path: Path) -> Model:
        """The model of the .xml file at `path` and its .bin, compiled. Raises EngineError with the file."""
        return self.compiled(self.read(path))

    def read(self, path: Path) -> Any:
        """The same, not compiled: models that are compiled of one reading share its constants in memory."""
        for part in (path, path.with_suffix(".bin")):
            if not part.is_file():
                raise EngineError(f"{part.name} is missing from {part.parent}; copy the bundle again, whole")
        with translated(f"{path.name} cannot be loaded", _LOAD_REMEDY):
            model = core().read_model(path, path.with_suffix(".bin"))
            model.set_friendly_name(path.stem)
            return model

    def compiled(
        self,
        source: Any,
        shapes: Mapping[str, Sequence[int]] | None = None,
        constants: Mapping[str, NDArray[Any]] | None = None,
    ) -> Model:
        """`source` compiled. Raises EngineError.

        `shapes` fix inputs to a shape and `constants` replace inputs, for a model that is much faster with them.
        """
        name = source.get_friendly_name()
        with translated(f"{name}.xml cannot be loaded", _LOAD_REMEDY):
            model = source.clone()
            for key, value in (constants or {}).items():
                parameter = model.input(key).get_node()
                parameter.output(0).replace(ov.op.Constant(value).output(0))
                model.remove_parameter(parameter)
            if shapes:
                model.reshape(dict(shapes))
            inputs, outputs = ([value.get_any_name() for value in side] for side in (model.inputs, model.outputs))
            return Model(core().compile_model(model, self.device, self.properties), name, inputs, outputs)


class Model:
    """A compiled model, and requests to run it, which are used again and again, each by one thread at a time.

    `inputs` and `outputs` are the file's names, in order; compiling may give them others besides.
    """

    def __init__(self, compiled: Any, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.compiled, self._what = compiled, f"the model {name}"
        self.inputs, self.outputs = frozenset(inputs), tuple(outputs)
        self._idle: deque[Any] = deque()

    def request(self) -> Any:
        """A request with states of its own, for the caller to keep."""
        with translated(f"{self._what} cannot be run", _RUN_REMEDY):
            return self.compiled.create_infer_request()

    def run(self, inputs: Mapping[str, NDArray[Any]], interrupt: Interrupt | None = None) -> dict[str, NDArray[Any]]:
        """All outputs, by name, in arrays of their own; see `run_request`."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.request()
        try:
            self.run_request(request, inputs, interrupt)
            return self.outputs_of(request)
        finally:
            self._idle.append(request)

    def run_request(self, request: Any, inputs: Mapping[str, NDArray[Any]], interrupt: Interrupt | None = None) -> None:
        """Runs a request to its end; its outputs are read afterwards. The inputs are used where they lie.

        Setting `interrupt` from another thread ends the run after the layer that it is in, with Interrupted.
        OpenVINO's errors become EngineError.
        """
        with translated(f"{self._what} failed", _RUN_REMEDY):
            if interrupt is None:
                request.infer(self._taken(inputs), share_inputs=True, share_outputs=True)
                return
            request.start_async(self._taken(inputs), share_inputs=True)
            with interrupt.stopping(request.cancel):
                try:
                    request.wait()
                except RuntimeError as exc:
                    if interrupt.is_set():  # a run that was cancelled is reported as one that failed
                        raise Interrupted from exc
                    raise
        interrupt.check()

    def _taken(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The inputs that the model has: a constant in the place of one, or one that nothing needs, is none."""
        return {name: value for name, value in inputs.items() if name in self.inputs}

    def outputs_of(self, request: Any) -> dict[str, NDArray[Any]]:
        return {name: np.array(request.get_tensor(name).data) for name in self.outputs}


@cache
def core() -> Any:
    """OpenVINO's one entry of this process."""
    return ov.Core()


@contextmanager
def translated(what: str, remedy: str) -> Iterator[None]:
    """Turns OpenVINO's own exceptions into EngineError "<what>: <reason>; <remedy>", the cause kept."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as exc:
        raise EngineError(f"{what}: {_reason(exc)}; {remedy}") from exc


def _reason(exc: BaseException) -> str:
    """The last line that says something: the lines before it tell where in OpenVINO's source it was noticed."""
    lines = [line.strip() for line in str(exc).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [""])[-1][:300] or type(exc).__name__


def _properties(device: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the properties that the device knows; AUTO hands each device its own.

    What was compiled is kept in the user's cache, but for a CPU: there it would double the bundle's place on the disk
    to save two thirds of the three seconds that loading Mini-Omni takes.
    """
    if device == "AUTO":
        own = {part: _properties(part, wanted) for part in core().available_devices}
        return {"PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": str(cache_directory()), "DEVICE_PROPERTIES": own}
    known = set(core().get_property(device, "SUPPORTED_PROPERTIES"))
    properties = {name: value for name, value in wanted.items() if name in known}
    return properties if device == "CPU" else {**properties, "CACHE_DIR": str(cache_directory())}


def problem(device: str) -> str:
    """Why OpenVINO cannot compute on a device ("cpu", "gpu", "npu", "auto") here, and what to do; "" where it can."""
    if device not in _DEVICES:
        return f"openvino: unknown device {device!r}; known are {', '.join(_DEVICES)}"
    wanted, there = _DEVICES[device], core().available_devices
    if not there:
        return f"OpenVINO {version()} finds no device here, not even a CPU; {ENGINES['openvino'].install}"
    if wanted == "AUTO" or any(found.partition(".")[0] == wanted for found in there):
        return ""
    return (
        f"OpenVINO {version()} finds no {wanted} here (it finds {', '.join(there)}); install the driver of Intel's "
        f"{wanted}, or use --device cpu"
    )


def _device(name: str) -> str:
    if said := problem(name):
        raise EngineError(said)
    return _DEVICES[name]


def version() -> str:
    """The version of the OpenVINO library, without its build's name."""
    return str(ov.get_version()).partition("-")[0]


def cache_directory() -> Path:
    """Where compiled models are kept between processes: edgeomni/openvino in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "edgeomni" / "openvino"
