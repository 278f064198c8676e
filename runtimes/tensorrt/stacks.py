"""A stack of transformer blocks as an engine, and the KV buffers and contexts that one turn uses it with."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.runtimes.tensorrt.device import Device
from edgeomni.runtimes.tensorrt.engine import Context, Engine, Repeated, Shape, array_bytes
from edgeomni.runtimes.tensorrt.memory import Arena, Block, aligned
from edgeomni.spec import BodySpec

ROWS = 2
"""Rows of every KV cache, so that any turn can use any cache."""
POSITIONS = ("position_ids", "write_indices", "nonpad_kv_seqlen")
"""Inputs that say where new frames belong. The last is the number of frames cached afterwards; not every graph asks."""

_AT_ONCE = 128
"""Frames of one row appended at once: the buffers for more would outweigh what they gain."""


class Stack:
    """The body's or the TTS adapter's engine. Raises EngineError for one that is not of this model."""

    def __init__(self, engine: Engine, body: BodySpec, layers: int, frames: int, rows: int) -> None:
        self.engine, self.layers, self.rows, self.width = engine, layers, rows, body.width
        self.caches = [f"{part}.{i}" for i in range(layers) for part in ("key", "value")]
        self.cache_of_a_row = (body.kv_heads, frames, body.head_dim)
        engine.need(*POSITIONS[:2])
        self.positions = [name for name in POSITIONS if name in engine.tensors]
        engine.need_shapes(
            {"inputs_embeds": (-1, -1, body.width), "hidden": (-1, 1, body.width)}
            | {f"{when}_{name}": (-1, *self.cache_of_a_row) for name in self.caches for when in ("past", "present")}
        )
        self.puts_out_body = "body_out" in engine.tensors

    @property
    def most_frames(self) -> int:
        """Frames of one row that are appended at once, at most."""
        return min(_AT_ONCE, self.engine.most("inputs_embeds", 1, {"inputs_embeds": (1, -1, self.width)}))

    def position_shapes(self, rows: int, frames: int) -> dict[str, Shape]:
        return {name: (rows, frames) if name == "position_ids" else (rows,) for name in self.positions}

    def shapes(self, rows: int, frames: int) -> dict[str, Shape]:
        """The shapes of the inputs that vary."""
        wanted: dict[str, Shape] = {
            "inputs_embeds": (rows, frames, self.width),
            **self.position_shapes(rows, frames),
        }
        wanted |= {f"past_{name}": (rows, *self.cache_of_a_row) for name in self.caches}
        return {name: shape for name, shape in wanted.items() if -1 in self.engine.tensors[name].shape}


class Cache:
    """Keys and values of all layers of one stack, [rows, kv_heads, frames, head_dim] each, zeros at first.

    They must be numbers from the start: an engine may multiply what lies behind the frames cached so far by zero.
    """

    def __init__(self, arena: Arena, stack: Stack) -> None:
        self._device, self._stack = arena.device, stack
        self._heads, frames, head_dim = stack.cache_of_a_row
        self._frame = head_dim * stack.engine.tensors["past_key.0"].itemsize
        self._head = frames * self._frame
        self._pitch = aligned(stack.rows * self._heads * self._head)
        self._address = arena.array(self._pitch * len(stack.caches))

    def bind(self, context: Context) -> None:
        """Past and present share their memory, so that an engine writes new frames in place."""
        for i, name in enumerate(self._stack.caches):
            for when in ("past", "present"):
                context.bind(f"{when}_{name}", self._address + i * self._pitch)

    def copy_row(self, source: int, target: int, frames: int) -> None:
        """Enqueues a copy of the first `frames` frames of one row to another, all layers at once."""
        if not frames:
            return
        row = self._heads * self._head
        for head in range(self._heads):
            at = self._address + head * self._head
            width, height = frames * self._frame, len(self._stack.caches)
            self._device.copy_strided(at + target * row, at + source * row, self._pitch, width, height)


@dataclass(frozen=True)
class Staging:
    """Where the heads read: of the last row for text, of row 0 (or the TTS adapter) for audio."""

    text: int
    audio: int
    size: int


@dataclass(eq=False)
class Outputs:
    """What one pass put out: `text` [rows, D] and `audio`, which with a TTS adapter is its [1, D].

    In the engine's own type. They lie in buffers of the pass, until it is used again: then `keep` has copied them.
    The buffers of a state that is gone may be given back before that.
    """

    source: Pass
    rows: int
    kept: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def keep(self) -> None:
        if not self.kept:
            if self.source.closed:
                raise EngineError("the state of this hidden is gone, and its memory given back; ask while it is there")
            self.source.device.synchronize()
            self.kept = {name: array.copy() for name, array in self.source.outputs.host.items()}

    @property
    def audio_rows(self) -> int:
        return 1 if "audio" in self.source.outputs else self.rows

    def row(self, part: str, row: int) -> NDArray[np.generic]:
        """[D] of a row, for the "text" or the "audio" head."""
        self.keep()
        found: NDArray[np.generic] = self.kept["audio" if part == "audio" and "audio" in self.kept else "text"][row, 0]
        return found


class Pass:
    """Appending up to `frames` frames to each of `rows` rows of some caches: contexts, input and output buffers.

    With one frame nothing but the inputs' contents changes from call to call, so that it is launched as a CUDA graph.
    """

    def __init__(self, buffers: Buffers, arena: Arena, rows: int, frames: int) -> None:
        self.device, self._rows, self._frames = buffers.device, rows, frames
        self._buffers, self._arena = buffers, arena
        body = buffers.stacks[0]
        tensors, width = body.engine.tensors, body.width
        shapes = body.position_shapes(rows, frames) | {"inputs_embeds": (rows, frames, width)}
        self._inputs = Block(arena, {name: (shape, tensors[name].numbers) for name, shape in shapes.items()})
        hidden = tensors["hidden"]
        made: dict[str, tuple[Shape, np.dtype[Any]]] = {"text": ((rows, 1, width), hidden.raw)}
        if len(buffers.stacks) > 1:
            made["audio"] = ((1, 1, width), buffers.stacks[1].engine.tensors["hidden"].raw)
        self.outputs = Block(arena, made)
        self._contexts = tuple(self._context(i, stack) for i, stack in enumerate(buffers.stacks))
        self._repeated = Repeated(arena, self._contexts, self._enqueue) if frames == 1 else None
        self._last: weakref.ref[Outputs] | None = None

    @property
    def closed(self) -> bool:
        """Whether the memory of its outputs was given back."""
        return self._arena.closed

    def run(self, embeds: F32, past: int) -> Outputs:
        """Enqueues the frames embeds [rows, S, D] behind `past` frames; what comes out is there after `synchronize`."""
        last = self._last() if self._last is not None else None
        if last is not None:
            last.keep()
        self.device.synchronize()  # what still reads the pinned inputs
        self._fill(embeds, past)
        if self._repeated is not None:
            self._repeated.run()
        else:
            self._reshape(embeds.shape[1])
            self._enqueue()
        outputs = Outputs(self, self._rows)
        self._last = weakref.ref(outputs)
        return outputs

    def _fill(self, embeds: F32, past: int) -> None:
        frames, host = embeds.shape[1], self._inputs.host
        host["inputs_embeds"].reshape(-1)[: embeds.size] = embeds.reshape(-1)
        host["position_ids"].reshape(-1)[: self._rows * frames] = np.tile(np.arange(past, past + frames), self._rows)
        host["write_indices"].fill(past)
        if "nonpad_kv_seqlen" in host:
            host["nonpad_kv_seqlen"].fill(past + frames)

    def _reshape(self, frames: int) -> None:
        for stack, context in zip(self._buffers.stacks, self._contexts, strict=True):
            shapes = stack.shapes(self._rows if stack.puts_out_body or len(self._contexts) == 1 else 1, frames)
            for name in ("inputs_embeds", "position_ids"):
                if name in shapes:
                    context.reshape(name, shapes[name])

    def _enqueue(self) -> None:
        self._inputs.upload()
        for context in self._contexts:
            context.enqueue()
        staging, text = self._buffers.staging, self.outputs.address("text")
        audio = self.outputs.address("audio") if "audio" in self.outputs else text
        self.device.copy(staging.text, text + (self._rows - 1) * staging.size, staging.size)
        self.device.copy(staging.audio, audio, staging.size)
        self.outputs.download()

    def _context(self, i: int, stack: Stack) -> Context:
        """The body's context, or the TTS adapter's, which runs on row 0 of what the body puts out."""
        arena, buffers = self._arena, self._buffers
        rows = self._rows if i == 0 else 1
        context = stack.engine.context(
            arena, buffers.scratch, stack.shapes(rows, self._frames), fixed=self._frames == 1
        )
        for name in stack.positions:
            context.bind(name, self._inputs.address(name))
        buffers.caches[i].bind(context)
        if i == 0:
            context.bind("inputs_embeds", self._inputs.address("inputs_embeds"))
            context.bind("hidden", self.outputs.address("text"))
            if stack.puts_out_body:
                shape = (rows, self._frames, stack.width)
                self._body_out = arena.array(array_bytes(stack.engine.tensors["body_out"], shape))
                context.bind("body_out", self._body_out)
        else:
            context.bind("inputs_embeds", self._body_out)
            context.bind("hidden", self.outputs.address("audio"))
        return context


class Buffers:
    """All that one turn changes on the device: caches of every stack, and passes over them, made when first used."""

    def __init__(self, device: Device, stacks: tuple[Stack, ...], scratch: tuple[int, int], staging: Staging) -> None:
        self.device, self.stacks, self.scratch, self.staging = device, stacks, scratch, staging
        self.arena = Arena(device)
        try:
            self.caches = tuple(Cache(self.arena, stack) for stack in stacks)
        except BaseException:
            self.arena.close()
            raise
        self._passes: dict[tuple[int, bool], Pass] = {}

    def run(self, embeds: F32, past: int) -> Outputs:
        """Appends embeds [rows, S, D] behind `past` frames of the first rows."""
        rows, frames, _ = embeds.shape
        key = rows, frames == 1
        if key not in self._passes:
            self._passes[key] = self._new_pass(rows, 1 if frames == 1 else self.most_frames)
        return self._passes[key].run(embeds, past)

    def _new_pass(self, rows: int, frames: int) -> Pass:
        arena = Arena(self.device)
        try:
            made = Pass(self, arena, rows, frames)
        except BaseException:
            arena.close()
            raise
        self.arena.keep(arena.close)
        return made

    @property
    def most_frames(self) -> int:
        return min(stack.most_frames for stack in self.stacks)

    def copy_row(self, source: int, target: int, frames: int) -> None:
        """Enqueues a copy of one row of the body's cache; the TTS adapter has row 0 alone."""
        self.caches[0].copy_row(source, target, frames)
