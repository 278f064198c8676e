"""torch computing as an ONNX export computes: the weights as stored, the inputs as ONNX Runtime's kernels round them.

MatMulNBits at accuracy level 4 rounds its input to int8, symmetric, one scale per `block` inputs of a position.
DynamicQuantizeMatMul rounds it to uint8 with a zero point, one scale per tensor, as ONNX DynamicQuantizeLinear does.
Portable graphs dequantize their weights and round no input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.model import fake_quant
from edgeomni.quantize.schemes import Scheme

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_HEADS = ("text_head", "audio_head")


@contextmanager
def as_exported(model: OmniModel, component: Component, *, exact: bool, root: Path | None = None) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` computes as `component`'s graphs do.

    With `exact` it computes as the engine's exact mode does: the LLM's transformer blocks and the TTS adapter see
    float inputs, its heads see rounded ones all the same.
    """
    schemes = stored.schemes(component)
    rounded = {g: s for g, s in schemes.items() if not exact or component.name != "llm" or g in _HEADS}
    if component.meta["flavour"] != "ort":
        rounded = {}
    with (
        fake_quant.holding_stored_weights(model, component.name, schemes),
        fake_quant.changed_inputs(model, component.name, rounded, rounded_input),
    ):
        yield


def rounds_inputs(component: Component) -> bool:
    """Whether the transformer blocks' kernels round their inputs, so that exact mode and normal mode differ."""
    schemes = [s for g, s in stored.schemes(component).items() if g not in (*_HEADS, "embedding")]
    return component.meta["flavour"] == "ort" and any(s.blocked or s.kind == "int8_dynamic" for s in schemes)


def rounded_input(x: Tensor, scheme: Scheme) -> Tensor:
    """A linear layer's input as the kernel of its scheme sees it."""
    if scheme.blocked:
        return rounded_by_block(x, scheme.block)
    return rounded_by_tensor(x) if scheme.kind == "int8_dynamic" else x


def rounded_by_block(x: Tensor, block: int) -> Tensor:
    """x [.., k] as MatMulNBits sees it at accuracy level 4: int8, scale = absmax / 127 per `block` inputs."""
    k = x.shape[-1]
    blocks = nn.functional.pad(x, (0, -k % block)).unflatten(-1, (-1, block))
    peak = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, torch.zeros_like(peak))
    return ((blocks * inverse).round() * (peak / 127)).flatten(-2)[..., :k]


def rounded_by_tensor(x: Tensor) -> Tensor:
    """x as DynamicQuantizeMatMul sees it: uint8 over [min(x, 0), max(x, 0)], the zero point rounded."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    if scale == 0:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
