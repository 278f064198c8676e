"""The LLM's heads and embedding rows on ggml, from heads.gguf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.runtimes.ggml.files import Expected, Weights, read
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F32 as FLOAT
from edgeomni.spec import OmniSpec

ARCHITECTURE = "edgeomni-heads"
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0")
_ROWS_AT_ONCE = 64


class Heads:
    """Raises BundleError for a file that is not this model's, EngineError where ggml is missing."""

    def __init__(self, path: Path, spec: OmniSpec, threads: int) -> None:
        layout, width = spec.layout, spec.body.width
        audio_rows = layout.streams * layout.audio_vocab
        expected = {
            "text_head.weight": Expected((layout.text_vocab, width), TYPES),
            "audio_head.weight": Expected((audio_rows, width), TYPES),
        }
        if not spec.tied:
            expected["embedding.weight"] = Expected((layout.joint_vocab, width), TYPES)
        self._spec, self._weights = spec, Weights(read(path, ARCHITECTURE, expected))
        tables = ("text_head", "audio_head") if spec.tied else ("embedding", "embedding")
        heads = (self._weights[f"{name}_head.weight"] for name in ("text", "audio"))
        self._text, self._audio = (_Linear(weight, width, threads) for weight in heads)
        self._text_rows, self._audio_rows = (_Table(self._weights[f"{name}.weight"]) for name in tables)
        self._audio_start = 0 if spec.tied else layout.text_vocab

    def text_logits(self, hidden: F32) -> F32:
        """hidden [D] -> [text_vocab]."""
        return self._text(hidden)

    def audio_logits(self, hidden: F32) -> F32:
        """hidden [D] -> [K, audio_vocab]."""
        return self._audio(hidden).reshape(self._spec.layout.streams, -1)

    def embedding(self, ids: NDArray[np.int32]) -> tuple[F32, F32]:
        """Joint ids [rows, K+1, t] -> rows of the K audio streams summed, and of the text: both [rows, t, D].

        Raises EngineError for ids that have no row.
        """
        rows, streams, frames = ids.shape
        layout = self._spec.layout
        audio, text = ids[:, :-1] - layout.text_vocab, ids[:, -1]
        for name, given, count in (
            ("audio", audio, layout.streams * layout.audio_vocab),
            ("text", text, layout.text_vocab),
        ):
            if (odd := (given < 0) | (given >= count)).any():
                raise EngineError(f"{name} id {given[odd][0]} has no row among {count}; check the ids")
        found = self._audio_rows(audio.reshape(-1) + self._audio_start).reshape(rows, streams - 1, frames, -1)
        return found.sum(1), self._text_rows(text.reshape(-1)).reshape(rows, frames, -1)

    def close(self) -> None:
        for part in (self._text, self._audio, self._text_rows, self._audio_rows, self._weights):
            part.close()


class _Linear:
    """hidden [D] -> logits [n] of one weight."""

    def __init__(self, weight: int, width: int, threads: int) -> None:
        self._graph = Graph(threads)
        self._hidden = self._graph.input(FLOAT, 1, width)
        self._logits = self._graph.linear(weight, self._hidden)
        self._graph.output(self._logits)
        self._graph.ready()

    def __call__(self, hidden: F32) -> F32:
        return self._graph.run({self._hidden: hidden}, self._logits)[0]

    def close(self) -> None:
        self._graph.close()


class _Table:
    """ids int32 [n] -> rows float32 [n, D], a fixed number at a time."""

    def __init__(self, table: int) -> None:
        self._graph = Graph(threads=1)
        self._ids = self._graph.ids(_ROWS_AT_ONCE)
        self._rows = self._graph.rows(table, self._ids)
        self._graph.output(self._rows)
        self._graph.ready()

    def __call__(self, ids: NDArray[np.int32]) -> F32:
        few, places = np.unique(ids, return_inverse=True)  # a prompt is mostly the same few specials
        padded = np.zeros(-(-len(few) // _ROWS_AT_ONCE) * _ROWS_AT_ONCE, np.int32)
        padded[: len(few)] = few
        rows = [self._graph.run({self._ids: part}, self._rows) for part in padded.reshape(-1, _ROWS_AT_ONCE)]
        return np.concatenate(rows)[places.reshape(-1)]

    def close(self) -> None:
        self._graph.close()
