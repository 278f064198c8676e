"""Torch components -> ONNX graphs with external data, each by the builder of its kind."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from edgeomni.bundle import Component
from edgeomni.errors import UsageError

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

Flavour = Literal["ort", "portable"]
_BUILDERS = {"encoder": "encoder", "llm": "llm", "codec": "codec"}


def export(
    model: OmniModel, component: str, out: Path, precision: str, *, flavour: Flavour = "ort", block: int | None = None
) -> Component:
    """Writes `component` (encoder, llm or codec) into out/<component>/ and returns its manifest entry.

    `flavour` "ort" uses ONNX Runtime's fused operators, "portable" standard ones (opset 24) for other engines.
    `block` is the block size of blocked schemes (None: the policy's). Paths in the entry are relative to `out`.
    Raises UsageError for names that do not exist and ExportError for sizes that the operators cannot take.
    """
    if component not in _BUILDERS:
        raise UsageError(f"unknown component {component!r}; known are {', '.join(_BUILDERS)}")
    if flavour not in ("ort", "portable"):
        raise UsageError(f"unknown ONNX flavour {flavour!r}; known are ort and portable")
    directory = out / component
    directory.mkdir(parents=True, exist_ok=True)
    builder = import_module(f".{_BUILDERS[component]}", __package__)
    return cast(Component, builder.export(model, directory, out, precision, flavour, block))
