"""Writers of bundle components, one folder per format, imported only when asked for.

What a format's folder offers (export.py and the gate ask for it by these names):

    export(model, component, out, precision, **options) -> the component's manifest entry
    altered(model, component, root) -> names of stored tensors that are not what quantizing the model's weights gives
    as_exported(model, component, exact=...) -> a context in which the torch model computes as the export should;
        `exact`: as it should in the engine's exact mode
    rounds_inputs(component) -> whether kernels round their inputs, so that exact and normal mode differ
    codec_as_exported(model, component) -> the codec's plan with the weights as stored, None for the original weights
    schemes_of(component) -> tensor group -> Scheme
"""

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
