"""torch computing as an OpenVINO export computes in exact mode: the weights as stored, the inputs as they are.

OpenVINO's fast mode may round the inputs of compressed layers to 8 bits ("dynamic quantization"): on CPUs with VNNI
only, and layer by layer as its plugin decides from shapes. That is not imitated: what it costs shows in the gate's
quality figures, which are taken from the fast mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeomni.bundle import Component
from edgeomni.model import fake_quant
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import halved, read_plan
from edgeomni.quantize.schemes import Scheme, parse

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


@contextmanager
def as_exported(model: OmniModel, component: Component) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` holds its weights as `component` stores them."""
    with fake_quant.holding_stored_weights(model, component.name, stored_schemes(component)):
        yield


def codec_as_exported(model: OmniModel, component: Component) -> CodecPlan | None:
    """The codec decoder's plan holding its weights as stored; None where they are stored as they are."""
    if stored_schemes(component)["codec"].kind == "fp32":
        return None
    return halved(read_plan(model.codec, model.spec.codec))


def stored_schemes(component: Component) -> Mapping[str, Scheme]:
    """Tensor group -> scheme, as the manifest states them."""
    return {group: parse(text) for group, text in component.scheme.items()}
