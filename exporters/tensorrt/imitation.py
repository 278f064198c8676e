"""torch computing as the TensorRT graphs compute: weights as stored, inputs of products and caches in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from edgeomni.bundle import Component
from edgeomni.model import fake_quant
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import halved, read_plan
from edgeomni.quantize import tensorrt_kinds  # makes the kinds known  # noqa: F401
from edgeomni.quantize.schemes import Scheme, parse

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


@contextmanager
def as_exported(model: OmniModel, component: Component, *, exact: bool) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` computes as `component`'s graphs do.

    With `exact` it computes as the graphs do when all of their half precision is widened to float32.
    """
    schemes = stored_schemes(component)
    rounded = {} if exact or component.precision == "fp32" else schemes
    with (
        fake_quant.holding_stored_weights(model, component.name, schemes),
        fake_quant.changed_inputs(model, component.name, rounded, _half),
    ):
        yield


def codec_as_exported(model: OmniModel, component: Component) -> CodecPlan | None:
    """The codec decoder's plan holding its weights as stored; None where they are stored as they are."""
    if stored_schemes(component)["codec"].kind == "fp32":
        return None
    return halved(read_plan(model.codec, model.spec.codec))


def stored_schemes(component: Component) -> Mapping[str, Scheme]:
    """Tensor group -> scheme, as the manifest states them."""
    return {group: parse(text) for group, text in component.scheme.items()}


def _half(x: Tensor, _: Scheme) -> Tensor:
    return x.half().to(x)
