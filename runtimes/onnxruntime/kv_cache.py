"""A stack of transformer blocks as an ONNX Runtime session, and the KV buffers that one turn binds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.runtimes.onnxruntime.captured import Recorded, not_recorded
from edgeomni.spec import BodySpec


@dataclass(frozen=True, eq=False)
class Stack:
    """body.onnx or tts.onnx; `attention` ("gqa", "scatter" or "static") says which position inputs it has.

    `kv`: the type of keys and values.
    """

    session: Any
    attention: str
    body: BodySpec
    layers: int
    device: str
    puts_out_body: bool = False
    """Has the output body_out: the body of a model with a TTS adapter."""
    kv: type[np.floating[Any]] = np.float32
    records: bool = False
    """Its session records CUDA graphs of single frames (captured.py)."""


class Buffers:
    """Keys and values of all layers, [rows, kv_heads, frames, head_dim] each, allocated once.

    On CPU they are numpy arrays of zeros, whose pages cost nothing until they are written; on a GPU OrtValues.
    """

    def __init__(self, stack: Stack, rows: int, frames: int) -> None:
        self.stack, self.rows, self.frames = stack, rows, frames
        shape = (rows, stack.body.kv_heads, frames, stack.body.head_dim)
        self.names = [f"{part}.{i}" for i in range(stack.layers) for part in ("key", "value")]
        self.arrays = [_allocate(shape, stack) for _ in self.names]
        self._bindings: dict[int, _Binding] = {}

    def run(self, embeds: F32, past: int, options: ort.RunOptions | None = None) -> tuple[F32, F32 | None]:
        """Appends embeds [rows, S, D] behind `past` frames of the first rows.

        Returns hidden [rows, D] of the last position and body_out [rows, S, D], None where the stack has none.
        """
        rows = len(embeds)
        if rows not in self._bindings:
            self._bindings[rows] = _Binding(self, rows)
        return self._bindings[rows].run(embeds, past, options)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` frames of one row to another."""
        for array in self.arrays:
            if isinstance(array, np.ndarray):
                array[target, :, :length] = array[source, :, :length]
            else:  # once a turn, so the way through the host will do
                host = array.numpy()
                host[target, :, :length] = host[source, :, :length]
                array.update_inplace(host)


class _Binding:
    """IO binding of the first `rows` rows of some buffers.

    The arrays for a single frame stay bound from one decode step to the next: a step writes them and runs.
    """

    def __init__(self, buffers: Buffers, rows: int) -> None:
        self._stack, self._rows = buffers.stack, rows
        self._io = self._stack.session.io_binding()
        shape = (rows, self._stack.body.kv_heads, buffers.frames, self._stack.body.head_dim)
        self._shape, self._caches = shape, dict(zip(buffers.names, buffers.arrays, strict=True))
        self._bind_cache(self._io)
        self._one = _Step(self._stack, rows, 1)
        self._bound: _Step | None = None
        self._recorded: Recorded | None = None
        if self._stack.records:
            ports = self._one.inputs, self._one.outputs
            self._recorded = Recorded(self._stack.session, self._stack.device, *ports, self._bind_cache)

    def _bind_cache(self, io: Any) -> None:
        for name, array in self._caches.items():
            place = (self._stack.device, 0, self._stack.kv, self._shape, _address(array))
            io.bind_input(f"past_{name}", *place)
            io.bind_output(f"present_{name}", *place)

    def run(self, embeds: F32, past: int, options: ort.RunOptions | None) -> tuple[F32, F32 | None]:
        step = self._one if embeds.shape[1] == 1 else _Step(self._stack, self._rows, embeds.shape[1])
        step.fill(embeds, past)
        if step is self._one and self._recorded is not None and not self._recorded.failed:
            found = self._recorded.run(step.inputs, options, lambda: self._computed(step, None))
            return found["hidden"][:, 0].copy(), found.get("body_out")
        found = self._computed(step, options)
        return found["hidden"][:, 0].copy(), step.body_out()

    def _computed(self, step: _Step, options: ort.RunOptions | None) -> dict[str, NDArray[Any]]:
        if self._stack.records:
            options = not_recorded(options)
        if self._bound is not step or self._stack.device != "cpu":  # a GPU copies its inputs when they are bound
            step.bind(self._io)
            self._bound = step
        self._stack.session.run_with_iobinding(self._io, options)
        return step.outputs


class _Step:
    """Host arrays for what goes in and comes out of appending `frames` frames to `rows` rows."""

    def __init__(self, stack: Stack, rows: int, frames: int) -> None:
        self._frames, width = frames, stack.body.width
        self.inputs: dict[str, NDArray[Any]] = {"inputs_embeds": np.zeros((rows, frames, width), np.float32)}
        if stack.attention == "gqa":
            self.inputs["seqlens_k"] = np.zeros(rows, np.int32)
            self.inputs["total_sequence_length"] = np.zeros((), np.int32)
        else:
            self.inputs["position_ids"] = np.zeros((rows, frames), np.int64)
            self.inputs["write_indices"] = np.zeros(rows, np.int64)
            if stack.attention == "scatter":
                self.inputs["nonpad_kv_seqlen"] = np.zeros(rows, np.int64)
        self.outputs = {"hidden": np.zeros((rows, 1, width), np.float32)}
        if stack.puts_out_body:
            self.outputs["body_out"] = np.zeros((rows, frames, width), np.float32)

    def fill(self, embeds: F32, past: int) -> None:
        total = past + self._frames
        self.inputs["inputs_embeds"][:] = embeds
        if "seqlens_k" in self.inputs:
            self.inputs["seqlens_k"].fill(total - 1)
            self.inputs["total_sequence_length"].fill(total)
        else:
            self.inputs["position_ids"][:] = np.arange(past, total)
            self.inputs["write_indices"].fill(past)
            if "nonpad_kv_seqlen" in self.inputs:
                self.inputs["nonpad_kv_seqlen"].fill(total)

    def bind(self, io: Any) -> None:
        for name, array in self.inputs.items():
            io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self.outputs.items():
            io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def body_out(self) -> F32 | None:
        return self.outputs["body_out"].copy() if "body_out" in self.outputs else None


def cache_type(session: Any) -> type[np.floating[Any]]:
    """What a body's graph holds keys and values in."""
    kinds = {i.name: i.type for i in session.get_inputs()}
    return np.float16 if kinds.get("past_key.0") == "tensor(float16)" else np.float32


def _allocate(shape: tuple[int, ...], stack: Stack) -> Any:
    zeros = np.zeros(shape, stack.kv)
    return zeros if stack.device == "cpu" else ort.OrtValue.ortvalue_from_numpy(zeros, stack.device, 0)


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())
