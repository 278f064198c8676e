"""Torch components -> ONNX graphs with external data, each by the builder of its kind.

See edgeomni/exporters/__init__.py for what these functions promise. torch and onnx are imported when one is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from edgeomni.bundle import Component
from edgeomni.errors import UsageError

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

Flavour = Literal["ort", "portable"]


def export(
    model: OmniModel, component: str, out: Path, precision: str, *, flavour: Flavour = "ort", block: int | None = None
) -> Component:
    """Writes `component` (encoder, llm or codec) into out/<component>/ and returns its manifest entry.

    `flavour` "ort" uses ONNX Runtime's fused operators, "portable" standard ones (opset 24) for other engines.
    `block` is the block size of blocked schemes (None: the policy's). Paths in the entry are relative to `out`.
    Raises UsageError for names that do not exist and ExportError for sizes that the operators cannot take.
    """
    if component not in ("encoder", "llm", "codec"):
        raise UsageError(f"unknown component {component!r}; known are encoder, llm, codec")
    if flavour not in ("ort", "portable"):
        raise UsageError(f"unknown ONNX flavour {flavour!r}; known are ort and portable")
    directory = out / component
    directory.mkdir(parents=True, exist_ok=True)
    builder = import_module(f".{component}", __package__)
    return cast(Component, builder.export(model, directory, out, precision, flavour, block))


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of stored tensors that differ from what quantizing `model`'s weights gives."""
    from edgeomni.exporters.onnx import reread

    return reread.altered(model, component, root)


def as_exported(model: OmniModel, component: Component, *, exact: bool) -> AbstractContextManager[None]:
    """Within the context `model`'s encoder or LLM computes as `component`'s graphs do."""
    from edgeomni.exporters.onnx import imitation

    return imitation.as_exported(model, component, exact=exact)


def rounds_inputs(component: Component) -> bool:
    """Whether the transformer blocks' kernels round their inputs, so that the exact mode differs."""
    from edgeomni.exporters.onnx import imitation

    return imitation.rounds_inputs(component)


def codec_as_exported(model: OmniModel, component: Component) -> Any:
    """The codec decoder's CodecPlan holding its weights as stored; None where they are stored as they are."""
    from edgeomni.exporters.onnx import imitation

    return imitation.codec_as_exported(model, component)


def schemes_of(component: Component) -> Mapping[str, Any]:
    """Tensor group -> Scheme, as the manifest states them."""
    from edgeomni.exporters.onnx import imitation

    return imitation.schemes_of(component)
