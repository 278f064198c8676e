"""Re-reads the GGUF files of an export and names every tensor that is not what the checkpoint's weights give."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader

from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.exporters.gguf import codec, encoder
from edgeomni.exporters.gguf.imitation import importance_of_export
from edgeomni.exporters.gguf.tensors import Stored, head_tensors, stack_tensors

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names "role:tensor" of stored tensors that differ in type, shape or bytes, are missing, or are too many."""
    if component.name != "llm":
        return {"encoder": encoder, "codec": codec}[component.name].altered(model, component, root)
    schemes, importance = stored.schemes(component), importance_of_export(model, component, root)
    wrong = list[str]()
    for role, graph in component.graphs.items():
        heads = role == "heads"
        expected = head_tensors(model, schemes) if heads else stack_tensors(model, role, schemes, importance)
        wrong += [f"{role}:{name}" for name in _differing(root / graph.path, expected)]
    return wrong


def _differing(path: Path, expected: Iterable[Stored]) -> list[str]:
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    wrong = [tensor.name for tensor in expected if not _same(tensor, found.pop(tensor.name, None))]
    return wrong + sorted(found)


def _same(wanted: Stored, there: Any) -> bool:
    if there is None or there.tensor_type != wanted.type or list(there.shape[::-1]) != list(wanted.rows.shape):
        return False
    return np.array_equal(_raw(np.asarray(there.data)), _raw(wanted.packed()))


def _raw(array: Any) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
