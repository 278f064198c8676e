"""What the GGUF files of the encoder and of the codec have in common: how they are written, and read again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from edgeomni.exporters.gguf.tensors import Stored
from edgeomni.quantize.gguf_kinds import TYPES
from edgeomni.quantize.schemes import quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

Fact = int | float | str | bool


def write(
    path: Path, architecture: str, model: OmniModel, what: str, facts: Mapping[str, Fact], tensors: Iterable[Stored]
) -> None:
    """A GGUF file whose metadata says what it is (`what`), where it comes from, and `facts` about it.

    Raises OSError where it cannot be written.
    """
    writer = GGUFWriter(path, architecture)
    component = architecture.removeprefix("edgeomni-")
    writer.add_type("model")
    writer.add_name(f"{model.provenance.get('source') or 'a checkpoint'}: {component}")
    writer.add_description(what)
    writer.add_license(str(model.licences.get(component) or "unknown"))
    for key, value in facts.items():
        _ADD[type(value)](writer, f"edgeomni.{component}.{key}", value)
    for tensor in tensors:
        data, kind = packed(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def packed(tensor: Stored) -> tuple[np.ndarray[Any, Any], GGMLQuantizationType]:
    """A tensor as a file holds it, and its GGML type. What has one dimension is stored as it is."""
    data = tensor.rows if tensor.rows.ndim == 1 else quantize(tensor.rows, tensor.scheme).data
    return np.ascontiguousarray(data), GGMLQuantizationType[TYPES[tensor.scheme.kind]]


def differing(path: Path, expected: Iterable[Stored]) -> list[str]:
    """Names of stored tensors that differ in type, shape or bytes, are missing, or are too many."""
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    wrong = [tensor.name for tensor in expected if not _same(tensor, found.pop(tensor.name, None))]
    return wrong + sorted(found)


def _same(wanted: Stored, there: Any) -> bool:
    data, kind = packed(wanted)
    if there is None or there.tensor_type != kind or list(there.shape[::-1]) != list(wanted.rows.shape):
        return False
    return np.array_equal(_raw(np.asarray(there.data)), _raw(data))


def _raw(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


_ADD: dict[type, Any] = {
    bool: GGUFWriter.add_bool,
    int: GGUFWriter.add_uint32,
    float: GGUFWriter.add_float32,
    str: GGUFWriter.add_string,
}
