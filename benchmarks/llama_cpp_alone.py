"""llama.cpp by itself, for gguf_llm.py: whole models with one tied table of all rows, and turns on them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from edgeomni.arrays import F32

THREADS, PROMPT = 2, 200
PEER_ROWS = 151936
"""Rows of a plain Qwen2-0.5B's table."""


def write_whole(path: Path, bundle: Path, rows: int) -> None:
    """A whole model of a bundle's body and of `rows` rows of its heads' table, tied: what llama.cpp runs by itself."""
    from gguf import GGUFReader, GGUFWriter

    body, heads = (GGUFReader(bundle / "llm" / f"{name}.gguf") for name in ("body", "heads"))
    architecture = body.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture)
    for key, field in body.fields.items():
        if key.startswith(architecture) and not key.endswith("vocab_size"):
            value = field.contents()
            {int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("none")
    tables = {tensor.name: tensor for tensor in heads.tensors}
    table = np.concatenate([np.asarray(tables[f"{part}_head.weight"].data) for part in ("text", "audio")])[:rows]
    writer.add_tensor("token_embd.weight", table, raw_dtype=tables["text_head.weight"].tensor_type)
    for tensor in body.tensors:
        if tensor.name != "token_embd.weight":
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Whole:
    """A whole model on llama.cpp alone: embeddings or a token id in, logits out.

    As llama.cpp sets up a context by itself, or `like_ours`: then its blocks compute to the bit what the split model's
    do, since batches and attention have the same shapes, and all that can differ are the heads.
    """

    def __init__(self, path: Path, width: int, *, like_ours: bool) -> None:
        from edgeomni.runtimes.llamacpp.body import BATCH
        from edgeomni.runtimes.llamacpp.library import llama

        self.llama = lib = llama()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = 2048, 2, THREADS, THREADS
        self.piece = BATCH if like_ours else 512
        params.n_batch = params.n_ubatch = self.piece
        if like_ours:
            params.kv_unified, params.flash_attn_type = True, 0
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory, self.width = lib.llama_get_memory(self.context), width
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batches = {True: lib.llama_batch_init(512, width, 1), False: lib.llama_batch_init(512, 0, 1)}

    def fill(self, embeds: F32) -> None:
        """A prompt [t, D] in both rows."""
        self.llama.llama_memory_clear(self.memory, True)
        for first in range(0, len(embeds), self.piece):
            part = embeds[first : first + self.piece]
            self.decode(part, range(first, first + len(part)), [0] * len(part), outputs=False)
        self.llama.llama_memory_seq_cp(self.memory, 0, 1, -1, -1)

    def decode(self, given: Any, positions: Any, rows: Any, outputs: bool = True) -> list[F32]:
        """One call; `given` is float32 [n, D] or ids [n]. Returns the logits of each, views until the next call."""
        embeds = getattr(given, "ndim", 1) == 2
        batch = self.batches[embeds]
        batch.n_tokens = len(rows)
        if embeds:
            flat = np.ascontiguousarray(given, np.float32)
            ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
        for i, (position, row) in enumerate(zip(positions, rows, strict=True)):
            if not embeds:
                batch.token[i] = int(given[i])
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, row, outputs
        if status := self.llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        if not outputs:
            return []
        pointers = [self.llama.llama_get_logits_ith(self.context, i) for i in range(len(rows))]
        return [np.ctypeslib.as_array(pointer, shape=(self.vocab,)) for pointer in pointers]


class WholeTurn:
    """The same turn on the monolithic model: every frame is one decode of two rows, all logits read."""

    def __init__(self, whole: Whole, llm: Any, spec: Any, ids: Any) -> None:
        self.whole, self.llm, self.layout, self.at = whole, llm, spec.layout, PROMPT
        embeds = llm.embed(ids)
        whole.fill(embeds[0, :-1])
        self._choose(whole.decode(embeds[:, -1], [PROMPT - 1] * 2, [0, 1]))

    def _choose(self, logits: list[F32]) -> None:
        text, streams = self.layout.text_vocab, self.layout.streams
        self.audio = logits[0][text:].reshape(streams, -1).argmax(-1)
        self.text = int(logits[1][:text].argmax())

    def frame(self) -> None:
        from edgeomni.generate import next_ids

        embeds = self.llm.embed(next_ids(self.layout, self.audio, self.text, 2))[:, 0]
        self._choose(self.whole.decode(embeds, [self.at] * 2, [0, 1]))
        self.at += 1


class PeerTurn:
    """Plain text decoding of a Qwen2-0.5B shape: one token id in, 151936 logits out."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.at, self.token = whole, PROMPT, 7
        whole.fill(np.random.default_rng(0).standard_normal((PROMPT, whole.width)).astype(np.float32) * 0.05)

    def frame(self) -> None:
        self.token = int(self.whole.decode([self.token], [self.at], [0])[0].argmax())
        self.at += 1
