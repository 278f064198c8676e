"""How an export stores weights, as far as its manifest entry alone says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeomni.bundle import Component
from edgeomni.quantize.schemes import Scheme, parse

if TYPE_CHECKING:
    from edgeomni.model.codec_plan import CodecPlan
    from edgeomni.model.omni import OmniModel


def schemes(component: Component) -> Mapping[str, Scheme]:
    """Tensor group, or single parameter -> scheme, as the manifest states them."""
    return {group: parse(text) for group, text in component.scheme.items()}


def codec_as_exported(model: OmniModel, component: Component) -> CodecPlan | None:
    """The codec decoder's plan holding its weights in half precision; None where they are stored as they are."""
    if schemes(component)["codec"].kind == "fp32":
        return None
    from edgeomni.model.codec_reader import halved, read_plan

    return halved(read_plan(model.codec, model.spec.codec))
