"""Codec decoder on TensorRT: the static streaming graph, its states kept on the device.

One stream's states lie in the working memory that the engine's contexts are bound to. Where another stream (of another
session) comes in between, they are moved out of it and back by one copy within the device.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.runtimes.common.static_codec import StaticCodec
from edgeomni.runtimes.tensorrt.device import Arena, Block, Device, aligned
from edgeomni.runtimes.tensorrt.engine import Context, Engine, Repeated, Shape, array_bytes
from edgeomni.runtimes.tensorrt.opening import Engines
from edgeomni.spec import OmniSpec

_CAPTURED_SIZES = 2
"""Push sizes that get a context and a captured graph of their own: an answer has one, but for its ends."""

Inputs = Mapping[str, NDArray[Any]]


@dataclass(eq=False)
class StreamStates:
    """One stream's states: in the working memory, or where they were moved to to make room for another stream's."""

    moved_to: int | None = None


class TrtCodec(StaticCodec[StreamStates]):
    """Fulfils components.CodecDecoder. Pushes of several threads come one after another."""

    def __init__(self, meta: Mapping[str, Any], spec: OmniSpec, engines: Engines) -> None:
        super().__init__(spec.codec, meta)
        self._engines, self._device = engines, engines.device
        with engines.opening():
            self._engine = engines.open("codec")
            self._scratch = engines.scratch()
            self._states = _States(engines.arena, self._engine, meta)
            self._anything = _Push(self._engine, engines.arena, self._scratch, self._states)
        self._of_size: dict[Shape, _Push] = {}
        self._seen: Shape | None = None

    def _compute(self, inputs: Inputs, states: StreamStates | None) -> tuple[F32, StreamStates]:
        """Runs the graph on codes, pushed, total and noise -> wave [samples]; the states stay on the device."""
        with self._device.lock:
            if self._engines.closed:
                raise EngineError("this codec is closed; open it again")
            self._device.collect()
            states = self._states.made_current(states)
            return self._push_for(inputs).run(inputs), states

    def close(self) -> None:
        """Frees the engine; a stream of before is of no more use."""
        with self._device.lock:
            self._engines.close()

    def _push_for(self, inputs: Inputs) -> _Push:
        """A push size that comes twice running is the size that most will have."""
        size = tuple(array.shape[-1] for array in inputs.values())
        if size not in self._of_size and size == self._seen and len(self._of_size) < _CAPTURED_SIZES:
            self._of_size[size] = _Push(self._engine, self._engines.arena, self._scratch, self._states, inputs)
        self._seen = size
        return self._of_size.get(size, self._anything)


class _States:
    """The working memory: all states in one piece, and behind the same offsets what they become."""

    def __init__(self, arena: Arena, engine: Engine, meta: Mapping[str, Any]) -> None:
        self._arena, self._device, at = arena, arena.device, 0
        self._offsets = {}
        for state in meta["states"]:
            name, shape = state["name"], tuple(state["shape"])
            engine.need_shapes({f"state.{name}": shape, f"next.{name}": shape})
            self._offsets[name] = at
            at += aligned(array_bytes(engine.tensors[f"state.{name}"], shape))
        self.size = max(at, 1)
        self._now, self._next = arena.array(self.size), arena.array(self.size)
        self._current: weakref.ref[StreamStates] | None = None
        self._free: deque[int] = deque()

    def bind(self, context: Context) -> None:
        for name, offset in self._offsets.items():
            context.bind(f"state.{name}", self._now + offset)
            context.bind(f"next.{name}", self._next + offset)

    def advance(self) -> None:
        """Enqueues that what the states became is what they are."""
        self._device.copy(self._now, self._next, self.size)

    def made_current(self, states: StreamStates | None) -> StreamStates:
        """Enqueues what brings a stream's states (None: a new one's) into the working memory, and others out of it."""
        before = self._current() if self._current is not None else None
        if states is None or before is not states:
            if before is not None:
                self._move_out(before)
            states = self._moved_in(states)
            self._current = weakref.ref(states)
        return states

    def _move_out(self, states: StreamStates) -> None:
        """The memory for it is free again when the stream is gone."""
        if states.moved_to is None:
            states.moved_to = self._free.pop() if self._free else self._arena.array(self.size)
            weakref.finalize(states, self._free.append, states.moved_to).atexit = False
        self._device.copy(states.moved_to, self._now, self.size)

    def _moved_in(self, states: StreamStates | None) -> StreamStates:
        if states is None:
            self._device.zero(self._now, self.size)
            return StreamStates()
        assert states.moved_to is not None
        self._device.copy(self._now, states.moved_to, self.size)
        return states


class _Push:
    """A context with input and output buffers: for pushes of any size, or for those of the shapes of `like` alone."""

    def __init__(
        self, engine: Engine, arena: Arena, scratch: tuple[int, int], states: _States, like: Inputs | None = None
    ) -> None:
        self._device: Device = arena.device
        self._states, fixed = states, like is not None
        names = [t.name for t in engine.tensors.values() if t.is_input and not t.name.startswith("state.")]
        profile = engine.profiles[0]
        shapes = {name: like[name].shape if like else profile[name][1] for name in names}
        self._varying = [name for name in names if -1 in engine.tensors[name].shape]
        self._inputs = Block(arena, {name: (shapes[name], engine.tensors[name].raw) for name in names})
        varying = {name: shapes[name] for name in self._varying}
        self._context = engine.context(arena, scratch, varying, fixed=fixed)
        for name in names:
            self._context.bind(name, self._inputs.address(name))
        states.bind(self._context)
        self._wave = Block(arena, {"wave": (self._context.shape("wave"), engine.tensors["wave"].raw)})
        self._context.bind("wave", self._wave.address("wave"))
        self._repeated = Repeated(arena, (self._context,), self._enqueue) if fixed else None

    def run(self, inputs: Inputs) -> F32:
        self._device.synchronize()
        for name, array in inputs.items():
            self._inputs.host[name].reshape(-1)[: array.size] = array.reshape(-1)
        if self._repeated is not None:
            self._repeated.run()
        else:
            for name in self._varying:
                self._context.reshape(name, inputs[name].shape)
            self._enqueue()
        self._device.synchronize()
        samples = int(np.prod(self._context.shape("wave")))
        return self._wave.host["wave"].reshape(-1)[:samples].astype(np.float32)

    def _enqueue(self) -> None:
        self._inputs.upload()
        self._context.enqueue()
        self._states.advance()
        self._wave.download()
