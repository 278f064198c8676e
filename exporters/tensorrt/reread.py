"""Re-reads what an export wrote and names every stored tensor that is not what the checkpoint's weights give.

The graphs are made anew from the checkpoint, and every constant of theirs is compared with the one read from disk. The
engines hold the same weights in TensorRT's own layout, which nobody else reads: the builder's, not ours, to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeomni.bundle import Component
from edgeomni.exporters.onnx.reread import tensors
from edgeomni.exporters.onnx.weights import PARTS
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.exporters.tensorrt.writing import made
from edgeomni.quantize.schemes import Packed, parse, signed_codes

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

Bytes = NDArray[np.uint8]


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names "role:tensor" of stored tensors that differ from what `model`'s weights give, or that are missing.

    Rows of embedding tables are named "embedding_text:codes" and so on. Raises OSError for files that are not there.
    """
    blocks = {parse(text).block for text in component.scheme.values()} - {0}
    options = TensorRtOptions(cache=component.meta.get("context"), block=max(blocks, default=0) or None)
    parts = made(model, component.name, component.precision, options, component.meta.get("input_scales", {}))
    wrong = []
    for role, graph in component.graphs.items():
        found, wanted = dict(tensors(root / graph.path)), parts.graphs[role].constants
        names = sorted(set(found) | set(wanted))
        same = (n in found and n in wanted and np.array_equal(found[n], _raw(wanted[n])) for n in names)
        wrong += [f"{role}:{name}" for name, right in zip(names, same, strict=True) if not right]
    if component.name == "llm":
        wrong += _altered_tables(model, component, root, parts.schemes)
    return wrong


def _altered_tables(model: OmniModel, component: Component, root: Path, schemes: Mapping[str, Any]) -> list[str]:
    from edgeomni.exporters.tensorrt.llm import table_rows

    wrong = []
    for part in PARTS:
        rows, _ = table_rows(model, part, dict(schemes))
        table = component.meta["tables"][part]
        for field, right in _fields(rows, table).items():
            place = table[field]
            with (root / table["file"]).open("rb") as f:
                f.seek(place["offset"])
                if not np.array_equal(np.fromfile(f, np.uint8, right.nbytes), right):
                    wrong.append(f"embedding_{part}:{field}")
    return wrong


def _fields(rows: Packed, table: Mapping[str, Any]) -> dict[str, Bytes]:
    signed = table["codes"]["dtype"] in ("int8", "int4")
    fields = {"codes": _raw(signed_codes(rows) if signed else rows.data)}
    if rows.scales is not None:
        fields["scales"] = _raw(rows.scales.astype(np.float16 if table["scales"]["dtype"] == "float16" else np.float32))
    return fields


def _raw(value: Any) -> Bytes:
    if hasattr(value, "raw_data"):
        return np.frombuffer(value.raw_data, np.uint8)
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
