"""OpenVINO's files (.xml with the graph, .bin with the constants): writing a model, and finding its constants again.

Constants are found in the file itself, without OpenVINO, so that what is re-read is what lies on the disk.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.bundle import Port
from edgeomni.openvino_library import ov

_COUNTED = re.compile(r"[A-Z]\w*_\d+")
"""Names that OpenVINO gives by a counter of the process; ours begin with a small letter."""


@dataclass(frozen=True)
class Stored:
    """A constant: where its bytes lie in the .bin file, its element type ("f32", "i4") and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def save(model: Any, path: Path) -> list[Path]:
    """Writes `path` (.xml) and its .bin, every tensor in the type that it has. The same model gives the same bytes."""
    for i, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result") and _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name().lower()}_{i}")
    ov.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def constants(path: Path) -> Iterator[Stored]:
    """Every constant of an .xml file, in the file's order."""
    for layer in ET.parse(path).getroot().iter("layer"):
        if layer.get("type") == "Const" and (data := layer.find("data")) is not None:
            shape = tuple(int(d) for d in data.get("shape", "").split(",") if d)
            place = int(data.get("offset", "0")), int(data.get("size", "0"))
            yield Stored(layer.get("name", ""), data.get("element_type", ""), shape, *place)


def stored_bytes(path: Path, constant: Stored) -> NDArray[np.uint8]:
    """The bytes of a constant of the .xml file at `path`."""
    with path.with_suffix(".bin").open("rb") as f:
        f.seek(constant.offset)
        return np.fromfile(f, np.uint8, constant.size)


def signature(model: Any) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a model; a dimension that varies is called by its port and its place ("mask.2")."""
    return [_port(value) for value in model.inputs], [_port(value) for value in model.outputs]


def _port(value: Any) -> Port:
    name, dims = value.get_any_name(), value.get_partial_shape()
    shape = [d.get_length() if d.is_static else f"{name}.{axis}" for axis, d in enumerate(dims)]
    return Port(name, str(value.get_element_type().to_dtype()), shape)
