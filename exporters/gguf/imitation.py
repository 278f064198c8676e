"""torch computing as llama.cpp and ggml compute a GGUF export: weights as stored, inputs as their kernels round them.

ggml multiplies q4_0, q5_0 and q8_0 rows with inputs rounded to q8_0: int8 with one float16 scale per 32 inputs
(quantize_row_q8_0 in ggml/src/ggml-cpu/quants.c of ggml-org/llama.cpp). Float16 and bfloat16 rows meet inputs rounded to
the same type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgeomni.bundle import Component
from edgeomni.model import fake_quant
from edgeomni.quantize import gguf_kinds
from edgeomni.quantize.schemes import Scheme, parse

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def as_exported(model: OmniModel, component: Component) -> Iterator[None]:
    """Within the context the LLM of `model` computes as `component` does."""
    schemes = stored_schemes(component)
    with (
        fake_quant.holding_stored_weights(model, component.name, schemes),
        fake_quant.changed_inputs(model, component.name, schemes, rounded_input),
    ):
        yield


def rounds_inputs(component: Component) -> bool:
    return any(scheme.kind != "fp32" for scheme in stored_schemes(component).values())


def stored_schemes(component: Component) -> Mapping[str, Scheme]:
    """Tensor group -> scheme, as the manifest states them."""
    return {group: parse(text) for group, text in component.scheme.items()}


def rounded_input(x: Tensor, scheme: Scheme) -> Tensor:
    """A linear layer's input as the kernel of its scheme sees it."""
    if scheme.kind in _FLOATS:
        return x.to(_FLOATS[scheme.kind]).to(x)
    return rounded_to_q8_0(x) if scheme.blocked else x


def rounded_to_q8_0(x: Tensor) -> Tensor:
    """x [.., k], k a multiple of 32, in blocks of 32: codes by the float scale, values by the scale as float16."""
    blocks = x.unflatten(-1, (-1, gguf_kinds.INPUT_BLOCK))
    peak = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, torch.zeros_like(peak))
    return ((blocks * inverse).round() * (peak / 127).half().to(x)).flatten(-2)
