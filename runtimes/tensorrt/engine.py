"""One TensorRT engine: its tensors and optimization profiles, and execution contexts bound to fixed addresses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.runtimes.tensorrt.device import Device, Graph
from edgeomni.runtimes.tensorrt.kernels import Kernels
from edgeomni.runtimes.tensorrt.library import Library
from edgeomni.runtimes.tensorrt.memory import ALIGNMENT, Arena, size_of

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Range = tuple[Shape, Shape, Shape]
"""The least, the usual and the largest shape of an input."""
_REMEDY = "verify the bundle with `edgeomni verify`, or export it again with this EdgeOmni"
_log = logging.getLogger("edgeomni")


@dataclass(frozen=True)
class Tensor:
    """An input or output: `shape` has -1 where it varies, `dtype` is None where numpy has no such type."""

    name: str
    shape: Shape
    dtype: np.dtype[Any] | None
    itemsize: int
    is_input: bool

    @property
    def raw(self) -> np.dtype[Any]:
        """numpy's type, or an unsigned integer of the same size where it has none: for what is only moved."""
        return self.dtype or np.dtype(f"uint{8 * self.itemsize}")

    @property
    def numbers(self) -> np.dtype[Any]:
        """numpy's type: for what the host writes or reads. Raises EngineError where it has none."""
        if self.dtype is None:
            raise EngineError(f"the engine's {self.name} has a type that numpy does not know; {_REMEDY}")
        return self.dtype


class Engine:
    """An engine in device memory. `what` names it in messages ("llm/body").

    Raises EngineError where TensorRT does not take the bytes, or they do not fit the free memory.
    """

    def __init__(self, library: Library, device: Device, data: Any, what: str, kernels: Kernels | None = None) -> None:
        if (free := device.free_memory()) is not None and len(data) > free:
            raise EngineUnavailable(
                "memory",
                f"{what}: the engine has {len(data) >> 20:,} MiB, and {free >> 20:,} MiB of GPU memory are free; close "
                "what else uses it, or export a smaller precision",
            )
        self.what, self._device, self._module = what, device, library.module
        self._words, self._kernels = library.last_words, kernels
        self._engine: Any = library.deserialize(data, what)
        self.tensors = {t.name: t for t in self._read_tensors(library)}
        inputs = [t.name for t in self.tensors.values() if t.is_input]
        self._varies = any(-1 in self.tensors[name].shape for name in inputs)
        count = self._engine.num_optimization_profiles if self._varies else 1
        self.profiles: list[dict[str, Range]] = [{name: self._range(name, i) for name in inputs} for i in range(count)]
        self.scratch = int(self._engine.device_memory_size_v2)
        """Bytes that a context needs while it runs, which contexts may share that never run at once."""

    def need(self, *names: str) -> None:
        """Raises EngineError for tensors that the engine lacks."""
        if missing := [name for name in names if name not in self.tensors]:
            raise EngineError(f"{self.what}: the engine has no tensor {', '.join(missing)}; {_REMEDY}")

    def need_shapes(self, shapes: Shapes) -> None:
        """Raises EngineError where a tensor has another number of dimensions, or other fixed ones."""
        self.need(*shapes)
        for name, wanted in shapes.items():
            given = self.tensors[name].shape
            if len(given) != len(wanted) or any(
                w not in (g, -1) and g != -1 for g, w in zip(given, wanted, strict=True)
            ):
                raise EngineError(
                    f"{self.what}: {name} is {list(given)}, and this model needs {list(wanted)}; {_REMEDY}"
                )

    def most(self, name: str, axis: int, among: Shapes) -> int:
        """The largest size of an input's axis over the profiles that take the inputs `among` (-1: any size)."""
        sizes = [p[name][2][axis] for p in self.profiles if all(_within(s, p[n]) for n, s in among.items())]
        return max(sizes, default=0)

    def profile_for(self, shapes: Shapes) -> int:
        """The profile that takes these input shapes, the tightest of several. Raises EngineError for none."""
        fitting = [i for i, p in enumerate(self.profiles) if all(_within(s, p[n]) for n, s in shapes.items())]
        if not fitting:
            shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise EngineError(f"{self.what}: the engine was built for other shapes than {shown}; {_REMEDY}")
        return min(fitting, key=lambda i: sum(int(np.prod(self.profiles[i][n][2])) for n in shapes))

    def context(self, arena: Arena, scratch: tuple[int, int], shapes: Shapes, *, fixed: bool) -> Context:
        """A context for these input shapes (dynamic inputs only), which works in `scratch` (address, size).

        `fixed`: the shapes will not change, so that kernels may be made for them alone. The arena owns the context.
        """
        if scratch[1] < self.scratch:
            raise EngineError(f"{self.what}: {self.scratch} bytes of scratch memory are needed, not {scratch[1]}")
        made = self._create(fixed)
        if made is None:
            raise EngineError(
                f"{self.what}: TensorRT cannot make an execution context ({self._words()}); "
                "free GPU memory, or export a smaller precision"
            )
        if self.scratch:
            made.set_device_memory(*scratch)
        context = Context(self, self._device, made, self._words)
        arena.keep(context.close)
        if self._varies:
            context.use_profile(self.profile_for(shapes))
        for name, shape in shapes.items():
            context.reshape(name, shape)
        return context

    def save_kernels(self) -> None:
        """Keeps what TensorRT has compiled for this engine so far."""
        if self._kernels is not None:
            self._kernels.save()

    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.close()
        self._engine = None

    def _create(self, fixed: bool) -> Any:
        """TensorRT for RTX compiles kernels on the device; for fixed shapes it should do so before the first frame."""
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(self._module, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER if fixed else specialization.LAZY
        if self._kernels is not None:
            self._kernels.use(config)
        return self._engine.create_execution_context(config)

    def _read_tensors(self, library: Library) -> list[Tensor]:
        engine, found = self._engine, list[Tensor]()
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            dtype, itemsize = library.element(engine.get_tensor_dtype(name))
            if engine.get_tensor_location(name) != self._module.TensorLocation.DEVICE:
                raise EngineError(
                    f"{self.what}: {name} would be read by the host, which no graph can repeat; {_REMEDY}"
                )
            is_input = engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT
            found.append(Tensor(name, tuple(engine.get_tensor_shape(name)), dtype, itemsize, is_input))
        return found

    def _range(self, name: str, profile: int) -> Range:
        shape = self.tensors[name].shape
        if -1 not in shape:  # profiles need not speak of these
            return shape, shape, shape
        least, usual, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(usual), tuple(most)


class Context:
    """An execution context: input shapes and all addresses are set, then `enqueue` as often as wanted."""

    def __init__(self, engine: Engine, device: Device, context: Any, words: Callable[[], str]) -> None:
        self._engine, self._device, self._context, self._words = engine, device, context, words

    def use_profile(self, profile: int) -> None:
        self._device.enqueued()
        self._check(self._context.set_optimization_profile_async(profile, self._device.stream), "set a profile")

    def reshape(self, name: str, shape: Shape) -> None:
        """Sets the shape of an input."""
        self._check(self._context.set_input_shape(name, shape), f"give {name} the shape {list(shape)}")

    def shape(self, name: str) -> Shape:
        """The shape that a tensor has by the input shapes that are set."""
        return tuple(self._context.get_tensor_shape(name))

    def bind(self, name: str, address: int) -> None:
        """Says where a tensor lies on the device."""
        if address % ALIGNMENT:
            raise EngineError(f"{self._engine.what}: {name} would lie at {address:#x}, no multiple of {ALIGNMENT}")
        self._check(self._context.set_tensor_address(name, address), f"bind {name}")

    def enqueue(self) -> None:
        """Puts one run into the stream."""
        self._device.enqueued()
        self._check(self._context.execute_async_v3(self._device.stream), "run")

    def capturable(self) -> bool:
        """Whether the context says that a capture of it can work; TensorRT older than that question says nothing."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._device.stream))

    def close(self) -> None:
        self._context = None

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"{self._engine.what}: TensorRT cannot {what} ({self._words()}); {_REMEDY}")


class Repeated:
    """Work that is enqueued over and over alike: the second time captured as a CUDA graph, and launched from then on.

    The first time is run as it is, since TensorRT prepares things then that a capture forbids. Where capturing fails,
    all times are run as they are, and a warning says so once.
    """

    def __init__(self, arena: Arena, contexts: tuple[Context, ...], enqueue: Callable[[], None]) -> None:
        self._arena, self._contexts, self._enqueue = arena, contexts, enqueue
        self._warm, self._graph = False, None  # type: tuple[bool, Graph | None]
        self._capture = True

    def run(self) -> None:
        """Enqueues it once. The first time waits until it has been done."""
        if self._graph is not None:
            self._graph.launch()
            return
        device = self._arena.device
        if self._warm and self._capture:
            device.synchronize()
            self._graph = self._captured(device)
            if self._graph is not None:
                self._graph.launch()
                return
        self._enqueue()
        if not self._warm:
            device.synchronize()
            self._warm = True

    def _captured(self, device: Device) -> Graph | None:
        self._capture = False
        try:
            if not all(context.capturable() for context in self._contexts):
                raise EngineError("TensorRT says that it cannot be captured")
            graph = device.capture(self._enqueue)
        except EngineError as exc:
            _log.warning("CUDA graphs are not used, which costs some time in each frame: %s", exc)
            return None
        self._arena.keep(graph.close)
        return graph


def array_bytes(tensor: Tensor, shape: Shape) -> int:
    return size_of(shape, tensor.itemsize)


def _within(shape: Shape, limits: Range) -> bool:
    least, _, most = limits
    return len(shape) == len(least) and all(
        s == -1 or low <= s <= high for s, low, high in zip(shape, least, most, strict=True)
    )
