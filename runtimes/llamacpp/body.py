"""A stack of transformer blocks on llama.cpp: contexts with bounded KV caches, embeddings in, hidden vectors out.

llama.cpp ends the process where a batch or a sequence is larger than a context was made for, so that everything is
checked here first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeomni.arrays import F32
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.runtimes.llamacpp.library import llama, use_device

BATCH = 64
"""Positions of one call at most; llama.cpp allocates for as many. The loop feeds prompts in pieces of 64."""
KV_TYPES = {"f32": 0, "f16": 1}
"""What keys and values are held in -> enum ggml_type."""
_CELLS = 256
"""llama.cpp rounds the size of a cache up to a multiple of this."""
_ABORTED = 2
"""What llama_decode returns where the abort callback ended it."""


class Stack(NamedTuple):
    """A file that llama.cpp loads, already checked: `repacks` if its kernels want another order of the weights."""

    path: Path
    width: int
    layers: int
    repacks: bool


class Body:
    """The loaded model. Raises EngineError where llama.cpp cannot load the file or has no such device."""

    def __init__(self, stack: Stack, threads: int, device: str) -> None:
        self.llama, self.stack, self.threads, self.device = llama(), stack, threads, device
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers = use_device(device)
        # What is repacked lies in memory of its own, and a map of the file would hold it a second time.
        mapped = not stack.repacks and device == "cpu"
        params.load_mode = self.llama.LLAMA_LOAD_MODE_MMAP if mapped else self.llama.LLAMA_LOAD_MODE_NONE
        self.model = self.llama.llama_model_load_from_file(os.fsencode(stack.path), params)
        if not self.model:
            raise EngineError(f"llama.cpp cannot load {stack.path}; verify the bundle with `edgeomni verify`")
        if self.llama.llama_model_n_embd(self.model) != stack.width:
            raise EngineError(f"{stack.path}: its metadata and its tensors do not fit together; export again")

    def close(self) -> None:
        """Frees the model, after its contexts."""
        if self.model:
            self.llama.llama_model_free(self.model)
            self.model = None


class Output(NamedTuple):
    """Of the last position `hidden` [rows, D], normed; of every one `un_normed` [rows, t, D], None unless asked for."""

    hidden: F32
    un_normed: F32 | None


class Context:
    """KV cache and buffers for `rows` sequences of `frames` positions each. One thread at a time may use it.

    `kv_type` (of KV_TYPES) is what keys and values are stored in. `un_normed`: also give what comes before the
    final norm, of every position.
    """

    def __init__(self, body: Body, rows: int, frames: int, kv_type: str, *, un_normed: bool = False) -> None:
        self.rows, self.frames, self._body, self._llama = rows, frames, body, body.llama
        self._stop = ctypes.create_string_buffer(2)
        self._kept: _Kept | None = _Kept(self._llama, body.stack) if un_normed else None
        params = self._params(kv_type)
        self._context = self._llama.llama_init_from_model(body.model, params)
        if not self._context:
            said = f"llama.cpp cannot allocate a cache of {rows} x {frames} frames; check memory"
            raise EngineUnavailable("memory", said)
        self._memory = self._llama.llama_get_memory(self._context)
        self._batch = self._llama.llama_batch_init(BATCH, body.stack.width, 1)
        for i in range(BATCH):
            self._batch.n_seq_id[i] = 1
        self._single_frame_threads = self._threads = body.threads

    def _params(self, kv_type: str) -> Any:
        params, body = self._llama.llama_context_default_params(), self._body
        # One cache for all rows: a row that is forked shares its cells, and one graph serves every row.
        params.kv_unified = True
        params.n_ctx, params.n_seq_max = -(-self.frames * self.rows // _CELLS) * _CELLS, self.rows
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = body.threads
        params.embeddings, params.pooling_type = True, self._llama.LLAMA_POOLING_TYPE_NONE
        params.type_k = params.type_v = KV_TYPES[kv_type]
        on_cpu = body.device == "cpu"
        # On the CPU flash attention is no faster here, and what it gives depends on the number of threads.
        params.flash_attn_type = (
            self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if on_cpu else self._llama.LLAMA_FLASH_ATTN_TYPE_AUTO
        )
        params.offload_kqv = params.op_offload = not on_cpu
        params.abort_callback = _stops_when_set()
        params.abort_callback_data = ctypes.addressof(self._stop)
        if self._kept is not None:
            params.cb_eval = self._kept.callback
        return params

    def set_threads(self, threads: int) -> None:
        """How many threads compute single frames; prompts keep all."""
        self._single_frame_threads = threads

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._memory, False)

    def copy_row(self, source: int, target: int) -> None:
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget_row(self, row: int) -> None:
        self._llama.llama_memory_seq_rm(self._memory, row, -1, -1)

    def append(self, embeds: F32, start: int, interrupt: Interrupt | None, *, together: bool) -> Output:
        """embeds [rows, t, D] of rows 0 .. rows - 1, at positions start .. -> their output.

        `together`: several rows in one call, rather than one call for each. Raises Interrupted where `interrupt` is
        set, EngineError where llama.cpp could not compute.
        """
        if not self._context:
            raise EngineError("this LLM is closed; open it again")
        rows, frames, width = embeds.shape
        if rows > self.rows or start + frames > self.frames or width != self._body.stack.width or not frames:
            raise EngineError(f"embeddings {list(embeds.shape)} from position {start} do not fit this cache")
        self._use(self._single_frame_threads if frames == 1 else self._body.threads)
        self._stop[0] = b"\0"
        with (interrupt or Interrupt()).stopping(self._stop_now):
            groups = [range(rows)] if together else [range(row, row + 1) for row in range(rows)]
            parts = [self._appended(embeds[group.start : group.stop], group, start) for group in groups]
        un_normed = None if self._kept is None else np.concatenate([part.un_normed for part in parts if part])
        return Output(np.concatenate([part.hidden for part in parts]), un_normed)

    def _use(self, threads: int) -> None:
        if threads != self._threads:
            self._llama.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads

    def _stop_now(self) -> None:
        self._stop[0] = b"\1"

    def _appended(self, embeds: F32, rows: Sequence[int], start: int) -> Output:
        at_once, kept = BATCH // len(rows), []
        for first in range(0, embeds.shape[1], at_once):
            piece = embeds[:, first : first + at_once]
            self._decode(piece, rows, start + first)
            if self._kept is not None:
                kept.append(self._kept.taken().reshape(*piece.shape))
        count = piece.shape[1]
        hidden = np.stack([self._hidden((i + 1) * count - 1) for i in range(len(rows))])
        return Output(hidden, np.concatenate(kept, axis=1) if kept else None)

    def _hidden(self, position: int) -> F32:
        """What the last call gave at a position of its batch, copied: the next call writes over it."""
        pointer = self._llama.llama_get_embeddings_ith(self._context, position)
        if not pointer:
            raise EngineError("llama.cpp gave no hidden vector; update llama-cpp-python")
        return np.array(np.ctypeslib.as_array(pointer, shape=(self._body.stack.width,)))

    def _decode(self, embeds: F32, rows: Sequence[int], start: int) -> None:
        frames, flat = embeds.shape[1], np.ascontiguousarray(embeds, np.float32)
        batch = self._batch
        batch.n_tokens = len(rows) * frames
        ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
        for i in range(batch.n_tokens):
            row, frame = divmod(i, frames)
            batch.pos[i], batch.seq_id[i][0], batch.logits[i] = start + frame, rows[row], True
        status = self._llama.llama_decode(self._context, batch)
        if status == _ABORTED:
            raise Interrupted
        if status:
            raise EngineError(f"llama.cpp could not compute (status {status}); check memory")

    def close(self) -> None:
        """Frees cache and buffers."""
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._context = None


def _stops_when_set() -> Any:
    """An abort callback without Python in it, so that asking it at every node of a graph waits for no other thread.

    C's strlen of two bytes, the second of them 0: "" is 0, which is false, and any other first byte makes it 1.
    """
    library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    return llama().ggml_abort_callback(ctypes.cast(library.strlen, ctypes.c_void_p).value)


class _Kept:
    """What the last block gives before the final norm, taken out of the graph while it is computed.

    llama.cpp's graphs name that tensor "l_out-<block>" and ask the callback of a context about every node.
    """

    def __init__(self, llama_cpp: Any, stack: Stack) -> None:
        from edgeomni.runtimes.ggml.library import library

        self._ggml, self._width = library(), stack.width
        self._name = f"l_out-{stack.layers - 1}".encode()
        self._values: F32 | None = None
        self._failed = ""
        make: Callable[[Any], Any] = llama_cpp.ggml_backend_sched_eval_callback
        self.callback = make(self._asked)

    def taken(self) -> F32:
        """[positions, D] of the last call."""
        if self._values is None:
            raise EngineError(f"llama.cpp's graph has no {self._name.decode()} as expected; update llama-cpp-python")
        values, self._values = self._values, None
        return values

    def _asked(self, tensor: int, ask: bool, _: Any) -> bool:
        from edgeomni.runtimes.ggml.functions import Tensor

        found = Tensor.from_address(tensor)
        if found.name != self._name:
            return not ask
        if not ask and found.ne[0] == self._width and found.type == 0:
            values = np.empty((found.ne[1], self._width), np.float32)
            self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self._values = values
        return True
