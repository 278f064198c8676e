"""A headless body on llama.cpp: contexts with bounded KV caches, embeddings in, normed hidden vectors out.

llama.cpp ends the process where a batch or a sequence is larger than a context was made for, so that everything is
checked here first.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.engines import ENGINES
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.runtimes.ggml.files import Expected, read
from edgeomni.spec import BodySpec

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0")
NO_EMBEDDING_ROWS = 32
BATCH = 512
"""Positions of one call at most; llama.cpp allocates for as many."""
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
"""enum ggml_log_level; what llama.cpp calls information is detail to us."""
_F32 = 0
_ABORTED = 2
"""What llama_decode returns where the abort callback ended it."""
_log = logging.getLogger("edgeomni.llamacpp")


@lru_cache(maxsize=1)
def llama() -> Any:
    """llama_cpp, its backend initialized and its messages sent to logging. Raises EngineError where it is missing."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as exc:
        raise EngineError(f"llama-cpp-python cannot be loaded ({exc}); {ENGINES['llama.cpp'].install}") from exc
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@lru_cache(maxsize=1)
def _log_callback(llama_cpp: Any) -> Any:
    def said(level: int, text: bytes, _: Any) -> None:
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", text.decode("utf-8", "replace").rstrip())

    return llama_cpp.llama_log_callback(said)


def expected_tensors(body: BodySpec) -> dict[str, Expected]:
    """The tensors of body.gguf, by their GGUF names."""
    width, q, kv = body.width, body.heads * body.head_dim, body.kv_heads * body.head_dim
    linear = {
        "attn_q": (q, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, q),
        "ffn_gate": (body.ffn, width),
        "ffn_up": (body.ffn, width),
        "ffn_down": (width, body.ffn),
    }
    biased = [*(("attn_q", "attn_k", "attn_v") if body.qkv_bias else ()), *(("attn_output",) if body.o_bias else ())]
    biased += ["ffn_gate", "ffn_up", "ffn_down"] if body.mlp_bias else []
    gains = {"attn_norm": width, "ffn_norm": width}
    gains |= {"attn_q_norm": body.head_dim, "attn_k_norm": body.head_dim} if body.qk_norm else {}
    found = {
        "token_embd.weight": Expected((NO_EMBEDDING_ROWS, width), ("F32",)),
        "output_norm.weight": Expected((width,), ("F32",)),
    }
    for i in range(body.layers):
        found |= {f"blk.{i}.{name}.weight": Expected(shape, TYPES) for name, shape in linear.items()}
        found |= {f"blk.{i}.{name}.bias": Expected((linear[name][0],), ("F32",)) for name in biased}
        found |= {f"blk.{i}.{name}.weight": Expected((n,), ("F32",)) for name, n in gains.items()}
    return found


class Body:
    """The loaded model. Raises BundleError for a file that is not this body's, EngineError where it cannot be loaded."""

    def __init__(self, path: Path, spec: BodySpec, threads: int) -> None:
        self.llama, self.spec, self.threads = llama(), spec, threads
        architecture = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}[spec.kind]
        read(path, architecture, expected_tensors(spec))
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise EngineError(f"llama.cpp cannot load {path}; verify the bundle with `edgeomni verify`")
        if self.llama.llama_model_n_embd(self.model) != spec.width:
            raise EngineError(f"{path}: its metadata and its tensors do not fit together; export again")

    def close(self) -> None:
        if self.model:
            self.llama.llama_model_free(self.model)
            self.model = None


class Context:
    """KV cache and buffers for `rows` sequences of `frames` positions each."""

    def __init__(self, body: Body, rows: int, frames: int) -> None:
        self.rows, self.frames, self._body, self._llama = rows, frames, body, body.llama
        params = self._llama.llama_context_default_params()
        per_row = -(-frames // 256) * 256
        params.n_ctx, params.n_seq_max = per_row * rows, rows
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = body.threads
        params.embeddings, params.pooling_type = True, self._llama.LLAMA_POOLING_TYPE_NONE
        params.type_k = params.type_v = _F32
        params.offload_kqv = False
        self._interrupt: Interrupt | None = None
        self._abort = self._llama.ggml_abort_callback(
            lambda _: self._interrupt is not None and self._interrupt.is_set()
        )
        params.abort_callback = self._abort
        self._context = self._llama.llama_init_from_model(body.model, params)
        if not self._context:
            raise EngineError(f"llama.cpp cannot allocate a cache of {rows} x {frames} frames; check memory")
        self._memory = self._llama.llama_get_memory(self._context)
        self._batch = self._llama.llama_batch_init(BATCH, body.spec.width, 1)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._memory, True)

    def copy_row(self, source: int, target: int) -> None:
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget_row(self, row: int) -> None:
        self._llama.llama_memory_seq_rm(self._memory, row, -1, -1)

    def append(self, embeds: F32, start: int, interrupt: Interrupt | None, *, together: bool) -> F32:
        """embeds [rows, t, D] of rows 0 .. rows - 1, at positions start .. -> hidden [rows, D] of the last position.

        `together`: several rows in one call, rather than one call for each.
        """
        if not self._context:
            raise EngineError("this LLM is closed; open it again")
        rows, frames, _ = embeds.shape
        if together:
            return self._appended(embeds, range(rows), start, interrupt)
        return np.concatenate([self._appended(embeds[row : row + 1], [row], start, interrupt) for row in range(rows)])

    def _appended(self, embeds: F32, rows: Sequence[int], start: int, interrupt: Interrupt | None) -> F32:
        """embeds [len(rows), t, D] -> hidden [len(rows), D]."""
        at_once = BATCH // len(rows)
        for first in range(0, embeds.shape[1], at_once):
            piece = embeds[:, first : first + at_once]
            self._decode(piece, rows, start + first, interrupt)
        count = piece.shape[1]
        return np.stack([self._hidden((i + 1) * count - 1) for i in range(len(rows))])

    def _hidden(self, position: int) -> F32:
        """What the last call gave at a position of its batch, copied: the next call writes over it."""
        pointer = self._llama.llama_get_embeddings_ith(self._context, position)
        if not pointer:
            raise EngineError("llama.cpp gave no hidden vector; update llama-cpp-python")
        return np.array(np.ctypeslib.as_array(pointer, shape=(self._body.spec.width,)))

    def close(self) -> None:
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._context = None

    def _decode(self, embeds: F32, rows: Sequence[int], start: int, interrupt: Interrupt | None) -> None:
        frames, flat = embeds.shape[1], np.ascontiguousarray(embeds, np.float32)
        batch = self._batch
        batch.n_tokens = len(rows) * frames
        ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
        for i in range(batch.n_tokens):
            row, frame = divmod(i, frames)
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + frame, 1, rows[row]
            batch.logits[i] = frame == frames - 1
        self._interrupt = interrupt
        try:
            status = self._llama.llama_decode(self._context, batch)
        finally:
            self._interrupt = None
        if status == _ABORTED:
            raise Interrupted
        if status:
            raise EngineError(f"llama.cpp could not compute (status {status}); check memory")
