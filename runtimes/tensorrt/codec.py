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
from edgeomni.runtimes.common.static_codec import StaticCodec
from edgeomni.runtimes.tensorrt.engine import Context, Engine, Repeated, array_bytes
from edgeomni.runtimes.tensorrt.memory import Arena, Block, aligned
from edgeomni.runtimes.tensorrt.opening import Engines
from edgeomni.spec import OmniSpec

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
            engine, arena = engines.open("codec"), engines.arena
            scratch = engines.scratch()
            self._states = _States(arena, engine, meta)
            self._of_any_size = _Push(engine, arena, scratch, self._states, usual=False)
            self._usual = _Push(engine, arena, scratch, self._states, usual=True)
            for push in (self._of_any_size, self._usual, self._usual):  # so that no answer waits for preparations
                push.run_on_zeros()

    def _compute(self, inputs: Inputs, states: StreamStates | None) -> tuple[F32, StreamStates]:
        """Runs the graph on codes, pushed, total and noise -> wave [samples]; the states stay on the device."""
        with self._engines.using():
            self._device.collect()
            states = self._states.made_current(states)
            push = self._usual if self._usual.fits(inputs) else self._of_any_size
            return push.run(inputs), states

    def close(self) -> None:
        """Frees the engine; a stream of before is of no more use."""
        with self._device.lock:
            self._engines.close()


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
    """A context with input and output buffers: for pushes of the `usual` size alone, which is captured, or of any."""

    def __init__(self, engine: Engine, arena: Arena, scratch: tuple[int, int], states: _States, *, usual: bool) -> None:
        self._device, self._states = arena.device, states
        tensors, profile = engine.tensors, engine.profiles[0]
        names = [t.name for t in tensors.values() if t.is_input and not t.name.startswith("state.")]
        self._shapes = {name: profile[name][1 if usual else 2] for name in names}
        self._varying = [name for name in names if -1 in tensors[name].shape]
        self._inputs = Block(arena, {name: (shape, tensors[name].numbers) for name, shape in self._shapes.items()})
        shapes = {name: self._shapes[name] for name in self._varying}
        self._context = engine.context(arena, scratch, shapes, fixed=usual)
        for name in names:
            self._context.bind(name, self._inputs.address(name))
        states.bind(self._context)
        self._wave = Block(arena, {"wave": (self._context.shape("wave"), tensors["wave"].numbers)})
        self._context.bind("wave", self._wave.address("wave"))
        self._repeated = Repeated(arena, (self._context,), self._enqueue) if usual else None

    def fits(self, inputs: Inputs) -> bool:
        """Whether these inputs have the very shapes that the buffers were made for."""
        return all(self._shapes[name] == array.shape for name, array in inputs.items())

    def run(self, inputs: Inputs) -> F32:
        """One push -> wave [samples]. The caller may keep the array."""
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

    def run_on_zeros(self) -> None:
        self.run({name: np.zeros(shape, self._inputs.host[name].dtype) for name, shape in self._shapes.items()})

    def _enqueue(self) -> None:
        self._inputs.upload()
        self._context.enqueue()
        self._states.advance()
        self._wave.download()
