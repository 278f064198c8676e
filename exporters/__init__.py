"""Writers of bundle components, one folder per format, imported only when asked for.

What a format's folder offers by these names, so that export.py and the gate need not know which format it is:

    PRECISIONS                                         the names of the precisions that it offers
    Options(**given)                                   its own options, a frozen dataclass that checks them
    schemes_for(component, precision, options)         tensor group -> Scheme; UsageError for what is not offered
    export(model, component, out, precision, options)  writes the component and returns its manifest entry
    altered(model, component, root)                    stored tensors that are not what the model's weights give
    as_exported(model, component, exact=..., root=...) a context in which the torch model computes as the export should;
                                                       `exact`: as it should in the engine's exact mode; `root`: where
                                                       the export lies, for formats that read of it how they stored
    rounds_inputs(component)                           whether kernels round their inputs: then the exact mode differs
    codec_as_exported(model, component)                the codec's plan with the weights as stored; None: as they are
    stored_schemes(component)                          tensor group -> Scheme, as the manifest states them

Where there is something to say once about all components of the format: notes(components, options), a list of lines.
And where exporting takes minutes: TELLS_PROGRESS = True, and `export` takes `progress`, which is told each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any

from edgeomni.engines import FORMATS
from edgeomni.errors import UsageError


def exporter_of(format: str) -> ModuleType:
    """The exporter of a format. Raises UsageError that lists the known ones."""
    if format not in FORMATS:
        raise UsageError(f"unknown export format {format!r}; known are {', '.join(FORMATS)}")
    return import_module(f".{format}", __name__)


def options_of(format: str, given: Mapping[str, Any]) -> Any:
    """A format's own options, from their names and values. Raises UsageError for names and values that do not exist."""
    kind = exporter_of(format).Options
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"format {format} has no option {', '.join(unknown)}; known are {', '.join(known)}")
    return kind(**given)
