"""Writers of bundle components, one module per format, imported only when asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from edgeomni.errors import UsageError

TARGETS = {"onnx": "onnx"}
"""Format -> module with `export(model, component, out, precision, *, flavour, block) -> bundle.Component`."""


def load(name: str) -> ModuleType:
    """The exporter of a format. Raises UsageError that lists the known ones."""
    if name not in TARGETS:
        raise UsageError(f"unknown export format {name!r}; known are {', '.join(sorted(TARGETS))}")
    return import_module(f".{TARGETS[name]}", __name__)
