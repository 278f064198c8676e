"""Re-reads what an export wrote and names every stored tensor that is not what the checkpoint's weights give.

What must be stored is worked out from the checkpoint anew, by the reader of weights that the exporter uses as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.exporters.onnx.body import rope_of
from edgeomni.exporters.onnx.codec import build as build_codec
from edgeomni.exporters.onnx.graph import int_tensor
from edgeomni.exporters.onnx.weights import PARTS, PackedWeights, Part, embedding_rows, head_rows, packed_parts
from edgeomni.model.codec_reader import read_plan
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Packed, Scheme, parse, quantize, signed_codes

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_HEADS: dict[str, Part] = {"text_head": "text", "audio_head": "audio"}
Bytes = NDArray[np.uint8]
_Place = tuple[Path, int]


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names "role:tensor" of a component's stored tensors that differ from what `model`'s weights give.

    The rows of an embedding table are named "embedding_text:codes" and so on; they are read where the component's meta
    says that they lie. Bytes that are a head's as well are named once, by the head. Constants that come from no weight
    (shapes, axes) are not compared. Raises OSError for files that are not there.
    """
    wanted = _codec_bytes(model, component) if component.name == "codec" else _expected(model, component).bytes_of
    wrong, named = [], set[_Place | None]()
    for role, graph in component.graphs.items():
        for name, place, found in _stored(root / graph.path):
            layouts = wanted(name)
            if layouts is not None and not any(np.array_equal(found, layout) for layout in layouts):
                wrong.append(f"{role}:{name}")
                named.add(place)
    for part in PARTS:
        if table := component.meta.get("tables", {}).get(part):
            fields = _altered_table(model, root, part, table)
            wrong += [f"embedding_{part}:{f}" for f in fields if _place_of(root, table, f) not in named]
    return wrong


def _place_of(root: Path, table: Mapping[str, Any], field: str) -> _Place:
    return root / table["file"], int(table[field]["offset"])


def _expected(model: OmniModel, component: Component) -> _Expected:
    return _Expected(model, stored.schemes(component))


def _codec_bytes(model: OmniModel, component: Component) -> Callable[[str], list[Bytes]]:
    """The codec's weights are folded on their way into the graph, so its constants are worked out anew."""
    half = component.scheme["codec"] == "fp16"
    graph, _ = build_codec(read_plan(model.codec, model.spec.codec), component.meta["flavour"], half=half)
    constants = graph.constants
    return lambda name: [_raw(np.asarray(constants[name]))] if name in constants else []


def tensors(path: Path) -> Iterator[tuple[str, Bytes]]:
    """Every initializer of an ONNX file with its raw bytes, read back from disk."""
    return ((name, found) for name, _, found in _stored(path))


def _stored(path: Path) -> Iterator[tuple[str, _Place | None, Bytes]]:
    """Name, file and offset (None: in the graph itself), and raw bytes of every initializer."""
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {e.key: e.value for e in tensor.external_data}
            place = path.with_name(entries["location"]), int(entries["offset"])
            yield tensor.name, place, _read(*place, int(entries["length"]))
        else:
            inline = np.frombuffer(tensor.raw_data, np.uint8)
            yield tensor.name, None, inline if len(inline) else _raw(numpy_helper.to_array(tensor))


class _Expected:
    """What each stored tensor of an encoder or an LLM must be, in every layout that the graphs use."""

    def __init__(self, model: OmniModel, schemes: Mapping[str, Scheme]) -> None:
        self._model, self._schemes = model, schemes
        self._weights = PackedWeights.of(model, schemes)
        self._linear = lru_cache(maxsize=1)(self._read_linear)

    def bytes_of(self, name: str) -> list[Bytes] | None:
        """The layouts that tensor `name` may have: [] if none is right, None if it comes from no weight."""
        if name in ("rope.cos", "rope.sin"):
            rope = rope_of(self._model)
            return [_raw(rope.cos if name == "rope.cos" else rope.sin)]
        if name in self._weights and scheme_of(name, self._schemes) is None:
            return [_raw(self._weights.array(name))]
        if f"{name}.weight" in self._weights:  # a norm's gain under its module's name
            return [_raw(self._weights.array(f"{name}.weight"))]
        base, _, kind = name.rpartition(".")
        return self._bytes_of_linear(base, kind) if self._is_linear(base) else None

    def _is_linear(self, base: str) -> bool:
        return base in _HEADS or f"{packed_parts(base)[0]}.weight" in self._weights

    def _bytes_of_linear(self, base: str, kind: str) -> list[Bytes]:
        weight, bias = self._linear(base)
        if kind == "bias" and bias is not None:
            return [_raw(bias)]
        if kind == "zero_points" and weight.scheme.kind == "int8_dynamic":
            return [_raw(np.zeros(len(weight.data), np.int8))]
        if kind == "scales" and weight.scales is not None:
            return [_raw(weight.scales), _raw(weight.scales.T)]
        return _codes(weight) if kind in ("codes", "weight") else []

    def _read_linear(self, base: str) -> tuple[Packed, F32 | None]:
        if base in _HEADS:
            return quantize(head_rows(self._model, _HEADS[base]), self._schemes[base]), None
        return self._weights.linear(base)


def _codes(packed: Packed) -> list[Bytes]:
    if packed.scheme.blocked and packed.scheme.signed:
        codes = signed_codes(packed)
        layouts = [int_tensor(c, int(packed.scheme.bits)) for c in (codes, codes.T)]
        return [np.frombuffer(t.raw_data, np.uint8) if hasattr(t, "raw_data") else _raw(t) for t in layouts]
    return [_raw(packed.data), _raw(packed.data.T)]


def _altered_table(model: OmniModel, root: Path, part: Part, table: Mapping[str, Any]) -> list[str]:
    """Fields ("codes", "scales") of an embedding table whose bytes are wrong where the table says that they lie."""
    packed = quantize(embedding_rows(model, part), parse(table["scheme"]))
    signed = table["codes"]["dtype"] in ("int8", "int4")
    wanted = {"codes": _codes(packed)[0] if signed else _raw(packed.data)}
    if packed.scales is not None:
        wanted["scales"] = _raw(packed.scales)
    found = {field: _read(*_place_of(root, table, field), right.nbytes) for field, right in wanted.items()}
    return [field for field, right in wanted.items() if not np.array_equal(found[field], right)]


def _read(path: Path, offset: int, length: int) -> Bytes:
    with path.open("rb") as f:
        f.seek(offset)
        return np.fromfile(f, np.uint8, length)


def _raw(array: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
