"""Execution contexts of the recorder of TensorRT (tensorrt_recorder.py)."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from cuda_recorder import ALIGNMENT, Operation, ProtocolError
from numpy.typing import NDArray

SCRATCH = 4096
DTYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
}


class Context:
    def __init__(self, engine: Any, kernels: Any) -> None:
        self._kernels = kernels
        self._engine, self._cuda = engine, engine.tensorrt.cuda
        self._profile, self._switching, self._captured = 0, False, False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._ran_with: dict[str, tuple[int, ...]] | None = None
        self._sizes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        engine.tensorrt.living.add(self)

    def _change(self, what: str) -> None:
        """Raises ProtocolError where a graph depends on what is to change."""
        self._cuda.not_while_capturing(what)
        if self._captured:
            raise ProtocolError(f"{what} of a context that a captured graph runs")

    def set_device_memory(self, address: int, size: int) -> None:
        self._change("set_device_memory")
        if address % ALIGNMENT or size < SCRATCH:
            raise ProtocolError(f"scratch memory of {size} bytes at {address:#x}; {SCRATCH} aligned ones are needed")
        self._cuda.span(address, size, "device", "scratch memory")
        self._scratch = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._change("set_optimization_profile_async")
        if not 0 <= profile < self._engine.num_optimization_profiles:
            return False
        self._profile, self._shapes, self._switching = profile, {}, True
        self._cuda.note("set_optimization_profile_async")
        here = weakref.ref(self)

        def check() -> None:
            if here() is None:
                raise ProtocolError("the execution context whose profile is being switched is gone")

        def run() -> None:
            if (context := here()) is not None:
                context._switching = False

        self._cuda.enqueue(stream, Operation("profile", check, run))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change("set_input_shape")
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
        self._change("set_tensor_address")
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
        if self._cuda.is_capturing(stream):
            if self._ran_with != inputs or self._switching:
                raise ProtocolError("captured before a first run with these shapes")
            self._captured = True
            self._engine.tensorrt.while_captured()
        addresses, scratch, engine = dict(self._addresses), self._scratch, self._engine

        cuda, here = self._cuda, weakref.ref(self)

        def views(shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
            if (context := here()) is None:
                raise ProtocolError("the execution context of waiting or captured work is gone")
            return {n: context._view(n, addresses[n], shape) for n, shape in shapes.items()}

        def check() -> None:
            cuda.span(*scratch, "device", "scratch memory")
            check_aliases(views(inputs), views(outputs))

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
        dtype = np.dtype(DTYPES[self._engine.ports[name].type][1])
        size = int(np.prod(shape)) * dtype.itemsize
        view: NDArray[Any] = self._cuda.span(address, size, "device", f"tensor {name}").view(dtype)
        return view.reshape(shape)

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
            kinds = {n: DTYPES[p.type][1] for n, p in self._engine.inputs.items()}
            feed = {n: np.zeros(shape, kinds[n]) for n, shape in inputs.items()}
            given = self._engine.session.run(list(self._engine.outputs), feed)
            self._sizes[key] = {n: v.shape for n, v in zip(self._engine.outputs, given, strict=True)}
        return self._sizes[key]


def check_aliases(inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
    """TensorScatter writes in place: a cache's output must be its input's memory, and nothing else may overlap."""
    for out, target in outputs.items():
        source = out.replace("present_", "past_")
        if source in inputs and source != out and target.ctypes.data != inputs[source].ctypes.data:
            raise ProtocolError(f"{out} is not where {source} is, but TensorRT updates caches in place")
        for name, value in inputs.items():
            if name != source and np.shares_memory(target, value):
                raise ProtocolError(f"{out} overlaps the input {name}")
