"""Whisper encoder (arXiv 2212.04356) and adapter on ggml: log-mel in, LLM-width features out."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.common.encoder_window import wanted_features
from edgeomni.runtimes.ggml.backend import Backend
from edgeomni.runtimes.ggml.files import Expected, Weights, read
from edgeomni.runtimes.ggml.graph import Graph
from edgeomni.runtimes.ggml.library import F16
from edgeomni.runtimes.ggml.library import F32 as FLOAT
from edgeomni.spec import OmniSpec

ARCHITECTURE = "edgeomni-encoder"
TYPES = ("F32", "F16", "BF16", "Q8_0")
_EPS = 1e-5
_GPU_HEADS = (64, 80, 96, 112, 128, 256)
"""Widths of heads that fused attention on GPUs takes (ggml/src/ggml-cuda/fattn.cu)."""
_GRAPHS = 2
"""Graphs kept, each for one length of window: their buffers are the larger part of the encoder's memory."""
_LARGE = 32 << 20
"""Bytes. Building a graph whose buffer is larger takes no time beside what it computes, so it is not kept on a CPU."""
_STEP = 64
"""Wanted features are computed in multiples of this many, so that questions of about one length share a graph."""


def expected_tensors(spec: OmniSpec) -> dict[str, Expected]:
    """The tensors of encoder.gguf, by their names (exporters/gguf/encoder.py)."""
    encoder, adapter = spec.encoder, spec.adapter
    d, ffn = encoder.width, encoder.ffn
    vectors = {"a.conv1d.1.bias": d, "a.conv1d.2.bias": d, "a.post_ln.weight": d, "a.post_ln.bias": d}
    matrices = dict[str, tuple[int, int]]()
    for i in range(encoder.layers):
        at = f"a.blk.{i}"
        vectors |= {f"{at}.{norm}.{kind}": d for norm in ("ln1", "ln2") for kind in ("weight", "bias")}
        vectors |= {f"{at}.{name}.bias": d for name in ("attn_q", "attn_v", "attn_out", "ffn_down")}
        vectors[f"{at}.ffn_up.bias"] = ffn
        matrices |= {f"{at}.{name}.weight": (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
        matrices |= {f"{at}.ffn_up.weight": (ffn, d), f"{at}.ffn_down.weight": (d, ffn)}
    swiglu = adapter.kind == "swiglu"
    layers = {"fc_1": (adapter.hidden, d), "fc_2": (adapter.hidden, d)} if swiglu else {}
    layers["proj"] = (spec.body.width, adapter.hidden if swiglu else d)
    matrices |= {f"mm.a.{name}.weight": shape for name, shape in layers.items()}
    if adapter.bias:
        vectors |= {f"mm.a.{name}.bias": shape[0] for name, shape in layers.items()}
    floats = {
        "a.conv1d.1.weight": (d, 3 * spec.front_end.n_mels),
        "a.conv1d.2.weight": (d, 3 * d),
        "a.position_embd.weight": (encoder.context, d),
        **{name: (size,) for name, size in vectors.items()},
    }
    return {name: Expected(shape, ("F32",)) for name, shape in floats.items()} | {
        name: Expected(shape, TYPES) for name, shape in matrices.items()
    }


class GgmlEncoder:
    """Fulfils components.Encoder. `path` is the bundle's directory.

    Raises BundleError for a file that is not this model's, EngineError where ggml is missing or has no such device.
    """

    def __init__(
        self, path: Path, component: Component, spec: OmniSpec, threads: int | None, device: str = "cpu"
    ) -> None:
        self._spec = spec
        reader = read(path / component.graphs["encoder"].path, ARCHITECTURE, expected_tensors(spec))
        self._exact = component.scheme["encoder.linear"] == "fp32"
        self._backend = Backend(threads, device)
        self._weights = Weights(reader, self._backend)
        self._graphs: OrderedDict[tuple[int, int], _Encoding] = OrderedDict()
        self._lock = Lock()

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Interrupt | None = None) -> F32:
        """Log-mel [n_mels, t] (t even) -> the first `wanted` features [wanted or t // 2, D].

        Setting `interrupt` from another thread ends the run after the operation that it is in, with Interrupted.
        Raises EngineError for another shape.
        """
        wanted, frames = wanted_features(mel, wanted, self._spec), mel.shape[1] // 2
        with self._lock:
            if not self._backend.open:
                raise EngineError("this encoder is closed; open it again")
            key = frames, min(-(-wanted // _STEP) * _STEP, frames)
            try:
                return self._graph(*key).run(mel, interrupt)[:wanted]
            finally:
                self._release(key)

    def close(self) -> None:
        """Gives back what ggml holds."""
        with self._lock:
            while self._graphs:
                self._graphs.popitem()[1].graph.close()
            self._weights.close()
            self._backend.close()

    def _release(self, key: tuple[int, int]) -> None:
        """Gives memory back that the answer's frames then have: large buffers, and the pages of the weights."""
        kept = self._graphs.get(key)
        if kept is not None and self._backend.on_cpu and kept.graph.buffer_bytes > _LARGE:
            self._graphs.pop(key).graph.close()
            self._weights.release_pages()

    def _graph(self, frames: int, wanted: int) -> _Encoding:
        key = frames, wanted
        if key not in self._graphs:
            while len(self._graphs) >= _GRAPHS:
                self._graphs.popitem(last=False)[1].graph.close()
            self._graphs[key] = _Encoding(self._spec, self._weights, self._backend, *key, exact=self._exact)
        self._graphs.move_to_end(key)
        return self._graphs[key]


class _Encoding:
    """The graph for windows of `frames` positions, of which the first `wanted` features are computed.

    The last block's queries, its MLP and the adapter are computed for these alone; keys and values of all positions
    stay, so that nothing changes but the time. `exact` keeps everything in float32; otherwise keys and values are
    rounded to half precision and GELU is looked up in a table of half precision, as the linear layers' inputs are too.
    """

    def __init__(
        self, spec: OmniSpec, weights: Weights, backend: Backend, frames: int, wanted: int, *, exact: bool
    ) -> None:
        self.spec, self.weights, self.exact = spec, weights, exact
        self.frames, self.wanted = frames, wanted
        self.graph = Graph(backend=backend, nodes=96 + 64 * spec.encoder.layers)
        self.mel = self.graph.input(FLOAT, 2 * frames, 3 * spec.front_end.n_mels)
        self.edge = self.graph.input(FLOAT, 1, spec.encoder.width)
        x = self._positions(self._convolutions())
        for i in range(spec.encoder.layers):
            x = self._block(x, f"a.blk.{i}", last=i + 1 == spec.encoder.layers)
        self.features = self._adapter(self._norm(x, "a.post_ln"))
        self.graph.output(self.features)
        self.graph.ready()

    def run(self, mel: F32, interrupt: Interrupt | None) -> F32:
        """mel [n_mels, 2 * frames] -> features [wanted, D]."""
        padded = np.pad(np.ascontiguousarray(mel.T, np.float32), ((1, 1), (0, 0)))
        windows = sliding_window_view(padded, 3, axis=0).transpose(0, 2, 1).reshape(len(padded) - 2, -1)
        given = {self.mel: windows, self.edge: np.zeros((1, self.spec.encoder.width), np.float32)}
        (features,) = self.graph.compute(given, [self.features], interrupt)
        return features

    def _convolutions(self) -> int:
        """[frames, d]. Both have three taps and one padding; the second one's right padding is never reached."""
        g = self.graph
        x = self._gelu(self._linear(self.mel, "a.conv1d.1"))
        windows = g.windows(g.joined(self.edge, x), 3, step=2)
        return self._gelu(self._linear(g.contiguous(windows), "a.conv1d.2"))

    def _positions(self, x: int) -> int:
        return self.graph.add(x, self.graph.cut(self.weights["a.position_embd.weight"], 0, self.frames))

    def _block(self, x: int, at: str, *, last: bool) -> int:
        g = self.graph
        normed = self._norm(x, f"{at}.ln1")
        if last and self.wanted < self.frames:
            x = g.cut(x, 0, self.wanted)
        x = g.add(x, self._attention(normed, at, g.shape(x)[0]))
        hidden = self._gelu(self._linear(self._norm(x, f"{at}.ln2"), f"{at}.ffn_up"))
        return g.add(x, self._linear(hidden, f"{at}.ffn_down"))

    def _attention(self, x: int, at: str, queries: int) -> int:
        g, head = self.graph, self.spec.encoder.width // self.spec.encoder.heads
        q = self._heads(self._linear(g.cut(x, 0, queries), f"{at}.attn_q"))
        k, v = (self._heads(self._linear(x, f"{at}.attn_{name}")) for name in ("k", "v"))
        if not g.backend.on_cpu and (self.exact or head not in _GPU_HEADS):
            attended = self._plain_attention(q, k, v, head**-0.5)
        else:
            k, v = (k, v) if self.exact else (g.cast(k, F16), g.cast(v, F16))
            attended = g.attention(q, k, v, head**-0.5)
        return self._linear(attended, f"{at}.attn_out")

    def _plain_attention(self, q: int, k: int, v: int, scale: float) -> int:
        """The same in three steps, in float32, for GPUs whose fused kernel has no such heads or types."""
        g = self.graph
        weights = g.softmax(g.linear(g.contiguous(k), g.contiguous(q)), None, scale)
        attended = g.linear(g.contiguous(g.permuted(v, 0, 1, 3, 2)), weights)
        return g.reshaped(g.contiguous(g.permuted(attended, 0, 2, 1, 3)), g.shape(q)[-2], self.spec.encoder.width)

    def _heads(self, x: int) -> int:
        """[t, d] -> [1, heads, t, d / heads], where it lies."""
        g, (t, d), heads = self.graph, self.graph.shape(x), self.spec.encoder.heads
        return g.permuted(g.reshaped(x, 1, t, heads, d // heads), 0, 2, 1, 3)

    def _adapter(self, x: int) -> int:
        if self.spec.adapter.kind == "swiglu":
            x = self.graph.swiglu(self._linear(x, "mm.a.fc_1"), self._linear(x, "mm.a.fc_2"))
        return self._linear(x, "mm.a.proj")

    def _linear(self, x: int, name: str) -> int:
        return self.graph.linear(self.weights[f"{name}.weight"], x, self.weights.get(f"{name}.bias"))

    def _norm(self, x: int, name: str) -> int:
        return self.graph.norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], _EPS)

    def _gelu(self, x: int) -> int:
        return self.graph.unary("gelu_erf" if self.exact else "gelu", x)
