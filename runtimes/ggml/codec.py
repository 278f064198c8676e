"""Codec decoder on ggml: graphs for the kinds of pushes that occur, what their layers keep handed on as arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I64
from edgeomni.bundle import Component
from edgeomni.codec_layers import CodecLayer
from edgeomni.component_meta import GgufCodecMeta
from edgeomni.errors import BundleError, EngineError
from edgeomni.manifest import REMEDY
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing
from edgeomni.runtimes.ggml import codec_attention
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.codec_tensors import expected_tensors
from edgeomni.runtimes.ggml.decoding import Arrays, Decoding
from edgeomni.runtimes.ggml.files import Weights, read
from edgeomni.runtimes.ggml.pushes import Push
from edgeomni.schema import Source, typed
from edgeomni.spec import OmniSpec

ARCHITECTURE = "edgeomni-codec"
_GRAPHS = 6
"""Graphs kept: an answer has a first push, middle ones of one or two sizes, and a last one."""


class GgmlCodec(StreamingCodec[Arrays]):
    """Fulfils components.CodecDecoder. `path` is the bundle's directory.

    Raises BundleError for a file that is not this model's, EngineError where ggml is missing or has no such device.
    """

    def __init__(
        self, path: Path, component: Component, spec: OmniSpec, threads: int | None, device: str = "cpu"
    ) -> None:
        meta = typed(component.meta, GgufCodecMeta, Source(str(path), BundleError, REMEDY), newer=True)
        super().__init__(spec.codec, Timing.of(component.meta))
        self._meta, self._exact = meta, component.scheme["codec"] == "fp32"
        reader = read(path / component.graphs["codec"].path, ARCHITECTURE, expected_tensors(meta, spec.codec))
        arrays = {tensor.name: _values(tensor) for tensor in reader.tensors}
        self._tables = [arrays[f"lookup.{i}"] for i in range(len(meta.levels))]
        self._vectors = {name: np.array(v, np.float32) for name, v in arrays.items() if v.ndim == 1}
        self._backend = Backend(threads, device)
        self._weights = Weights(reader, self._backend)
        self._fresh: Arrays = {}
        self._graphs: OrderedDict[Push, Decoding] = OrderedDict()
        self._lock = Lock()

    def set_threads(self, threads: int) -> None:
        """How many threads of the CPU compute from the next push on."""
        with self._lock:
            self._backend.set_threads(threads)

    def close(self) -> None:
        """Gives back what ggml holds; streams that are open are of no more use."""
        with self._lock:
            while self._graphs:
                self._graphs.popitem()[1].graph.close()
            self._weights.close()
            self._backend.close()

    def _start(self) -> Arrays:
        return self._fresh

    def _push(self, codes: Sequence[I64], kept: Arrays, last: bool, noise: Sequence[F32] | None) -> tuple[F32, Arrays]:
        latents = self._lookup(codes)
        shapes = tuple((name, array.shape) for name, array in kept.items() if array.dtype == np.float32)
        push = Push(len(latents), kept is self._fresh, last, noise is not None, shapes)
        with self._lock:
            if not self._backend.open:
                raise EngineError("this codec is closed; open it again")
            decoding = self._graph(push)
            extra, positions = codec_attention.positions(decoding, kept)
            wave, now = decoding(latents, kept, noise, extra)
        return wave, now | positions

    def _lookup(self, codes: Sequence[I64]) -> F32:
        """Ids per level -> latents [n, width]: levels of a group summed, groups side by side."""
        groups: dict[int, F32] = {}
        for table, level, ids in zip(self._tables, self._meta.levels, codes, strict=True):
            if (odd := (ids < 0) | (ids >= len(table))).any():
                raise EngineError(f"the codec has no id {ids[odd][0]}; a level has {len(table)}")
            rows = np.repeat(table[ids].astype(np.float32), level.stride, axis=0)
            groups[level.group] = groups[level.group] + rows if level.group in groups else rows
        return np.concatenate(list(groups.values()), axis=1)

    def _graph(self, push: Push) -> Decoding:
        if push not in self._graphs:
            while len(self._graphs) >= _GRAPHS:
                self._graphs.popitem(last=False)[1].graph.close()
            width = _width(self._meta)
            layers: Sequence[CodecLayer] = self._meta.layers
            self._graphs[push] = Decoding(
                layers, width, self._weights, self._vectors, self._backend, push, exact=self._exact
            )
        self._graphs.move_to_end(push)
        return self._graphs[push]


def _width(meta: GgufCodecMeta) -> int:
    return sum({level.group: level.width for level in meta.levels}.values())


def _values(tensor: Any) -> NDArray[Any]:
    """A float tensor of a GGUFReader, where it lies in the file."""
    return np.asarray(tensor.data).reshape([int(n) for n in tensor.shape[::-1]])
