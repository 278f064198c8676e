"""Writers of bundle components, one module per format, imported only when asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from edgeomni.engines import FORMATS
from edgeomni.errors import UsageError


def load(name: str) -> ModuleType:
    """The exporter of a format. Raises UsageError that lists the known ones."""
    if name not in FORMATS:
        raise UsageError(f"unknown export format {name!r}; known are {', '.join(FORMATS)}")
    return import_module(f".{name}", __name__)
