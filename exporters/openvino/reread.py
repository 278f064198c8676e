"""Re-reads what an export wrote and names every stored tensor that is not what the checkpoint's weights give.

What must be stored is worked out from the checkpoint anew, by the reader of weights that the exporter uses as well, and
compared with the bytes of the .bin files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.exporters.onnx.body import rope_of
from edgeomni.exporters.onnx.weights import PARTS, PackedWeights, Part, embedding_rows, head_rows, packed_parts
from edgeomni.exporters.openvino import files
from edgeomni.exporters.openvino.codec import build as build_codec
from edgeomni.exporters.openvino.graph import stored_codes
from edgeomni.model.codec_reader import read_plan
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Packed, Scheme, parse, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_HEADS: dict[str, Part] = {"text_head": "text", "audio_head": "audio"}
Bytes = NDArray[np.uint8]


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names "role:tensor" of a component's stored tensors that differ from what `model`'s weights give.

    The rows of an embedding table are named "embedding_text:codes" and so on; they are read where the component's meta
    says that they lie. Constants that come from no weight (shapes, axes) are not compared.
    """
    wanted = _codec_bytes(model, component) if component.name == "codec" else _Expected(model, component).bytes_of
    wrong = list[str]()
    for role, graph in component.graphs.items():
        path = root / graph.path
        for constant in files.constants(path):
            expected = wanted(constant.name)
            if expected is not None and not np.array_equal(files.stored_bytes(path, constant), expected):
                wrong.append(f"{role}:{constant.name}")
    for part in PARTS:
        if table := component.meta.get("tables", {}).get(part):
            wrong += [f"embedding_{part}:{field}" for field in _altered_table(model, root, part, table)]
    return wrong


def _codec_bytes(model: OmniModel, component: Component) -> Callable[[str], Bytes | None]:
    """The codec's weights are folded on their way into the graph, so its constants are worked out anew."""
    half = component.scheme["codec"] == "fp16"
    graph, _ = build_codec(read_plan(model.codec, model.spec.codec), half=half)
    floats = {name: array for name, array in graph.constants.items() if np.asarray(array).dtype.kind == "f"}
    return lambda name: _raw(np.asarray(floats[name])) if name in floats else None


class _Expected:
    """What each stored tensor of an encoder or an LLM must be."""

    def __init__(self, model: OmniModel, component: Component) -> None:
        self._model = model
        self._schemes = stored.schemes(component)
        self._weights = PackedWeights.of(model, self._schemes)
        self._linear = lru_cache(maxsize=1)(self._read_linear)

    def bytes_of(self, name: str) -> Bytes | None:
        """The bytes that constant `name` must have; none at all if it should not be there, None if of no weight."""
        if name in ("rope.cos", "rope.sin"):
            rope = rope_of(self._model)
            return _raw(rope.cos if name == "rope.cos" else rope.sin)
        if name in self._weights and scheme_of(name, self._schemes) is None:
            return _raw(self._weights.array(name))
        base, _, kind = name.rpartition(".")
        return self._bytes_of_linear(base, kind) if self._is_linear(base) else None

    def _is_linear(self, base: str) -> bool:
        return base in _HEADS or f"{packed_parts(base)[0]}.weight" in self._weights

    def _bytes_of_linear(self, base: str, kind: str) -> Bytes:
        weight, bias = self._linear(base)
        if kind == "bias" and bias is not None:
            return _raw(bias)
        return _fields(weight).get(kind, np.zeros(0, np.uint8))

    def _read_linear(self, base: str) -> tuple[Packed, F32 | None]:
        if base in _HEADS:
            return quantize(head_rows(self._model, _HEADS[base]), self._schemes[base]), None
        return self._weights.linear(base)


def _fields(packed: Packed) -> dict[str, Bytes]:
    if packed.scales is None:
        return {"weight": _raw(packed.data)}
    return {"codes": stored_codes(packed), "scales": _raw(packed.scales)}


def _altered_table(model: OmniModel, root: Path, part: Part, table: Mapping[str, Any]) -> list[str]:
    """Fields ("codes", "scales") of an embedding table whose bytes are wrong where the table says that they lie."""
    scheme: Scheme = parse(table["scheme"])
    wanted = _fields(quantize(embedding_rows(model, part), scheme))
    wanted = {"codes": wanted["weight"]} if "weight" in wanted else wanted
    raw = np.memmap(root / table["file"], np.uint8, "r")
    found = {field: raw[table[field]["offset"] :][: right.nbytes] for field, right in wanted.items()}
    return [field for field, right in wanted.items() if not np.array_equal(found[field], right)]


def _raw(array: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
