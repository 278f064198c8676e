"""The LLM's heads and embedding rows, from heads.gguf: products on ggml, rows read where they lie in the file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I32
from edgeomni.errors import EngineError
from edgeomni.quantize.gguf_kinds import TYPES
from edgeomni.quantize.schemes import Packed, Scheme, dequantize
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.files import Weights
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F32 as FLOAT
from edgeomni.spec import OmniSpec

_FEW = 32
"""Ids up to which rows are unpacked one by one; a prompt is mostly the same few specials."""
_KIND_OF = {type_name: kind for kind, type_name in TYPES.items()}


class Heads:
    """`reader` is a GGUFReader whose tensors have been checked against `spec` (runtimes/llamacpp/files.py).

    The products are computed on `device`, with `threads` on the CPU. Raises EngineError where ggml has no such device.
    """

    def __init__(self, reader: Any, spec: OmniSpec, threads: int, device: str = "cpu") -> None:
        heads = {part: f"{part}_head.weight" for part in ("text", "audio")}
        self._spec, self._backend = spec, Backend(threads, device)
        self._weights = Weights(reader, self._backend, repacked=list(heads.values()))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._heads = {
            part: _Linear(self._weights[name], spec.body.width, self._backend) for part, name in heads.items()
        }
        self._rows = {
            part: RowsOf(tensors.get(f"{part}_embedding.weight", tensors[f"{part}_head.weight"]), part)
            for part in ("text", "audio")
        }

    def text_logits(self, hidden: F32) -> F32:
        """hidden [D] -> [text_vocab]."""
        return self._heads["text"](hidden)

    def audio_logits(self, hidden: F32) -> F32:
        """hidden [D] -> [K, audio_vocab]."""
        return self._heads["audio"](hidden).reshape(self._spec.layout.streams, -1)

    def embedding(self, ids: I32) -> tuple[F32, F32]:
        """Joint ids [rows, K+1, t] -> rows of the K audio streams summed, and of the text: both [rows, t, D].

        Raises EngineError for ids that have no row.
        """
        rows, streams, frames = ids.shape
        audio = self._rows["audio"][(ids[:, :-1] - self._spec.layout.text_vocab).reshape(-1)]
        text = self._rows["text"][ids[:, -1].reshape(-1)]
        return audio.reshape(rows, streams - 1, frames, -1).sum(1), text.reshape(rows, frames, -1)

    def set_threads(self, threads: int) -> None:
        """How many threads compute the heads from the next call on."""
        self._backend.set_threads(threads)

    def close(self) -> None:
        """Gives back what ggml holds."""
        for head in self._heads.values():
            head.close()
        self._weights.close()
        self._backend.close()


class _Linear:
    """hidden [D] -> logits [n] of one weight."""

    def __init__(self, weight: int, width: int, backend: Backend) -> None:
        self._graph = Graph(backend=backend, nodes=16)
        self._hidden = self._graph.input(FLOAT, 1, width)
        self._logits = self._graph.linear(weight, self._hidden)
        self._graph.output(self._logits)
        self._graph.ready()

    def __call__(self, hidden: F32) -> F32:
        logits: F32 = self._graph.run({self._hidden: hidden}, self._logits)[0]
        return logits

    def close(self) -> None:
        self._graph.close()


class RowsOf:
    """The rows of a tensor [n, D] of a GGUFReader, which maps the file. `name` is for messages."""

    def __init__(self, tensor: Any, name: str) -> None:
        self._name = name
        self._width, self._count = (int(n) for n in tensor.shape)
        self._scheme = Scheme(_KIND_OF[tensor.tensor_type.name])
        self._data: NDArray[Any] = tensor.data

    def __getitem__(self, ids: NDArray[np.integer[Any]]) -> F32:
        """ids [n] -> float32 [n, D]. Raises EngineError for an id that has no row."""
        if (odd := (ids < 0) | (ids >= self._count)).any():
            raise EngineError(f"{self._name} id {ids[odd][0]} has no row among {self._count}; check the ids")
        if len(ids) <= _FEW:
            return self._unpacked(ids)
        few, places = np.unique(ids, return_inverse=True)
        rows: F32 = self._unpacked(few)[places.reshape(-1)]
        return rows

    def _unpacked(self, ids: NDArray[np.integer[Any]]) -> F32:
        return dequantize(Packed(self._scheme, self._width, np.asarray(self._data[ids])))
