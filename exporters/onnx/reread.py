"""Re-reads what an export wrote and names every stored tensor that is not what the checkpoint's weights give.

Graph names follow the parameters' names, with these linears packed into one by rows:
self_attn.qkv = q, k, v; mlp.gate_up = gate, up; adapter.fc = fc_1, fc_2.
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
from edgeomni.exporters.onnx.codec import CodecGraph
from edgeomni.exporters.onnx.graph import int_tensor
from edgeomni.model.codec_reader import read_plan
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Packed, Scheme, parse, quantize, signed_codes

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

PACKED = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "adapter.fc": ("adapter.fc_1", "adapter.fc_2"),
}
Bytes = NDArray[np.uint8]


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names "role:tensor" of a component's stored tensors that differ from what `model`'s weights give."""
    wanted = _codec_bytes(model, component) if component.name == "codec" else _expected(model, component).bytes_of
    wrong = []
    for role, graph in component.graphs.items():
        for name, found in tensors(root / graph.path):
            layouts = wanted(name)
            if layouts is not None and not any(np.array_equal(found, layout) for layout in layouts):
                wrong.append(f"{role}:{name}")
    compared = {f"{graph.path}.data" for graph in component.graphs.values()}
    for part, table in component.meta.get("tables", {}).items():
        if table["file"] not in compared:
            wrong += [f"embedding_{part}:{field}" for field in _altered_table(model, component, root, part, table)]
    return wrong


def _expected(model: OmniModel, component: Component) -> _Expected:
    return _Expected(model, {group: parse(text) for group, text in component.scheme.items()})


def _codec_bytes(model: OmniModel, component: Component) -> Callable[[str], list[Bytes] | None]:
    """The codec's weights are folded on their way into the graph, so its constants are worked out anew."""
    half = component.scheme["codec"] == "fp16"
    decoder = CodecGraph(read_plan(model.codec, model.spec.codec), fused=component.meta["flavour"] == "ort", half=half)
    constants = decoder.build().constants

    def bytes_of(name: str) -> list[Bytes] | None:
        return [_raw(np.asarray(constants[name]))] if name in constants else None

    return bytes_of


def tensors(path: Path) -> Iterator[tuple[str, Bytes]]:
    """Every initializer of an ONNX file with its raw bytes, read back from disk."""
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {e.key: e.value for e in tensor.external_data}
            yield tensor.name, _read(path.with_name(place["location"]), int(place["offset"]), int(place["length"]))
        else:
            inline = np.frombuffer(tensor.raw_data, np.uint8)
            yield tensor.name, inline if len(inline) else _raw(numpy_helper.to_array(tensor))


class _Expected:
    """What each stored tensor must be, in every layout that the graphs use."""

    def __init__(self, model: OmniModel, schemes: Mapping[str, Scheme]) -> None:
        self.model, self.schemes = model, schemes
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._packed = lru_cache(maxsize=1)(self._pack)

    def bytes_of(self, name: str) -> list[Bytes] | None:
        """None for what is no weight of the model: constants of the graph."""
        base, _, kind = name.rpartition(".")
        if name in self._parameters and scheme_of(name, self.schemes) is None:
            return [_raw(self._array(name))]
        if f"{name}.weight" in self._parameters:  # a norm's gain under its module's name
            return [_raw(self._array(f"{name}.weight"))]
        if not base or not self._is_linear(base):
            return None
        if kind == "bias":
            return [_raw(self._bias(base))]
        packed = self._packed(base)
        if kind == "zero_points":
            return [_raw(np.zeros(len(packed.data), np.int8))]
        if kind == "scales" and packed.scales is not None:
            return [_raw(packed.scales), _raw(packed.scales.T)]
        return _codes(packed) if kind in ("codes", "weight") else None

    def rows(self, part: str, scheme: Scheme) -> Packed:
        """The embedding's rows of "text" or "audio"."""
        split = self.model.spec.layout.text_vocab
        rows = self._parameters["embedding.weight"]
        return quantize(_numpy(rows[:split] if part == "text" else rows[split:]), scheme)

    def _is_linear(self, base: str) -> bool:
        return base in ("text_head", "audio_head") or f"{packed_parts(base)[0]}.weight" in self._parameters

    def _pack(self, base: str) -> Packed:
        if base in ("text_head", "audio_head"):
            rows = self.model.text_rows() if base == "text_head" else self.model.audio_rows()
            return quantize(_numpy(rows), self.schemes[base])
        weight = np.concatenate([self._array(f"{p}.weight") for p in packed_parts(base)])
        scheme = scheme_of(f"{packed_parts(base)[0]}.weight", self.schemes)
        return quantize(weight, scheme or Scheme("fp32"))

    def _bias(self, base: str) -> F32:
        """Joined biases; a part without one (Whisper's k_proj) counts as zeros."""
        biases = []
        for part in packed_parts(base):
            rows = len(self._parameters[f"{part}.weight"])
            given = f"{part}.bias" in self._parameters
            biases.append(self._array(f"{part}.bias") if given else np.zeros(rows, np.float32))
        return np.concatenate(biases)

    def _array(self, name: str) -> F32:
        return _numpy(self._parameters[name])


def packed_parts(base: str) -> tuple[str, ...]:
    """Torch linears whose rows a linear of the graph holds, in order: (base,) where nothing was packed."""
    for packed, names in PACKED.items():
        if base.endswith(packed):
            return tuple(base.removesuffix(packed) + n for n in names)
    return (base,)


def _codes(packed: Packed) -> list[Bytes]:
    if packed.scheme.blocked and packed.scheme.signed:
        codes = signed_codes(packed)
        layouts = [int_tensor(c, packed.scheme.bits) for c in (codes, codes.T)]
        return [np.frombuffer(t.raw_data, np.uint8) if hasattr(t, "raw_data") else _raw(t) for t in layouts]
    return [_raw(packed.data), _raw(packed.data.T)]


def _altered_table(
    model: OmniModel, component: Component, root: Path, part: str, table: Mapping[str, Any]
) -> list[str]:
    """Fields of an embedding table whose bytes are wrong."""
    packed = _expected(model, component).rows(part, parse(table["scheme"]))
    layouts = {"codes": [_codes(packed)[0], _raw(packed.data)]}
    if packed.scales is not None:
        layouts["scales"] = [_raw(packed.scales)]
    wrong = []
    for field, wanted in layouts.items():
        file, offset = root / table["file"], table[field]["offset"]
        if not any(np.array_equal(_read(file, offset, w.nbytes), w) for w in wanted):
            wrong.append(field)
    return wrong


def _read(path: Path, offset: int, length: int) -> Bytes:
    with path.open("rb") as f:
        f.seek(offset)
        return np.fromfile(f, np.uint8, length)


def _raw(array: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _numpy(tensor: Any) -> F32:
    return np.asarray(tensor.detach().cpu().float().numpy())
