"""Re-reads the GGUF files of an export and names every tensor that is not what the checkpoint's weights give."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGUFReader

from edgeomni.bundle import Component
from edgeomni.exporters.gguf.imitation import stored_schemes
from edgeomni.exporters.gguf.llm import stored_bytes
from edgeomni.exporters.gguf.tensors import Stored, body_tensors, head_tensors

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names "role:tensor" of stored tensors that differ in type, shape or bytes, are missing, or are too many."""
    schemes = dict(stored_schemes(component))
    expected = {"body": body_tensors, "heads": head_tensors}
    wrong = list[str]()
    for role, graph in component.graphs.items():
        wrong += [f"{role}:{name}" for name in _differing(root / graph.path, expected[role](model, schemes))]
    return wrong


def _differing(path: Path, expected: Iterable[Stored]) -> list[str]:
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    wrong = []
    for tensor in expected:
        data, kind = stored_bytes(tensor)
        there = found.pop(tensor.name, None)
        same = there is not None and there.tensor_type == kind and list(there.shape[::-1]) == list(tensor.rows.shape)
        if not same or there is None or not np.array_equal(_raw(np.asarray(there.data)), _raw(data)):
            wrong.append(tensor.name)
    return wrong + sorted(found)


def _raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
