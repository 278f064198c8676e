"""torch computing as llama.cpp and ggml compute a GGUF export: weights as stored, inputs as their kernels round them.

Rows in blocks of 32 are multiplied with inputs rounded to q8_0 (int8, one float16 scale per 32 inputs), rows in blocks
of 256 with inputs rounded to q8_K (int8, one float32 scale per 256): `vec_dot_type` in ggml/src/ggml-cpu/ggml-cpu.c and
quantize_row_q8_0, quantize_row_q8_K in ggml/src/ggml-cpu/quants.c of ggml-org/llama.cpp. Float16 and bfloat16 rows meet
inputs rounded to the same type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.exporters.gguf import codec
from edgeomni.exporters.gguf.tensors import Importance, importance_of
from edgeomni.model import fake_quant
from edgeomni.model.bodies import KVCache
from edgeomni.quantize import gguf_kinds  # makes the kinds known  # noqa: F401
from edgeomni.quantize.schemes import Scheme

if TYPE_CHECKING:
    from edgeomni.model.codec_plan import CodecPlan
    from edgeomni.model.omni import OmniModel

_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HEADS = ("text_head", "audio_head")
_NARROW_BLOCK = 32
"""Blocks of this many inputs have their scale in float16."""


@contextmanager
def as_exported(model: OmniModel, component: Component, *, exact: bool, root: Path | None = None) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` computes as `component` does.

    With `exact` the transformer blocks see float inputs and keys and values stay float32, as in the engine's exact
    mode; the heads' inputs are rounded all the same. `root` is where the export lies.
    """
    schemes = stored.schemes(component)
    rounded = {group: scheme for group, scheme in schemes.items() if not exact or group in _HEADS}
    with (
        fake_quant.holding_stored_weights(model, component.name, schemes, importance_of_export(model, component, root)),
        fake_quant.changed_inputs(model, component.name, rounded, rounded_input),
        nullcontext() if exact or component.meta.get("kv") != "f16" else _half_cache(model),
    ):
        yield


def importance_of_export(model: OmniModel, component: Component, root: Path | None) -> Importance | None:
    """By what an export weighed the errors of its body; None where all inputs weighed alike."""
    imatrix = component.meta.get("imatrix")
    return importance_of(model, root / imatrix) if imatrix and root else None


class _HalfCache(KVCache):
    """Keys and values rounded to float16, as llama.cpp's cache holds them."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return super().update(key.half().to(key), value.half().to(value), layer_idx)


@contextmanager
def _half_cache(model: OmniModel) -> Iterator[None]:
    """Within the context `model` makes caches that hold float16."""

    def new_cache(rows: int, max_frames: int) -> KVCache:
        cache = type(model).new_cache(model, rows, max_frames)
        cache.__class__ = _HalfCache
        return cache

    model.new_cache = new_cache  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.new_cache


def rounds_inputs(component: Component) -> bool:
    """Whether the transformer blocks' kernels round their inputs, so that exact mode and normal mode differ."""
    return any(
        s.kind != "fp32" for group, s in stored.schemes(component).items() if group not in (*_HEADS, "embedding")
    )


def codec_as_exported(model: OmniModel, component: Component) -> CodecPlan | None:
    """The codec decoder's plan holding its weights as stored; None where they are stored as they are."""
    return codec.as_exported(model, component)


def rounded_input(x: Tensor, scheme: Scheme) -> Tensor:
    """A linear layer's input as the kernel of its scheme sees it."""
    if scheme.kind in _FLOATS:
        return x.to(_FLOATS[scheme.kind]).to(x)
    return rounded_by_block(x, scheme.block) if scheme.blocked else x


def rounded_by_block(x: Tensor, block: int) -> Tensor:
    """x [.., k], k a multiple of `block`: int8 codes by the float scale; values by it, or by it as float16."""
    blocks = x.unflatten(-1, (-1, block))
    peak = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, torch.zeros_like(peak))
    scale = peak / 127
    return ((blocks * inverse).round() * (scale.half().to(x) if block == _NARROW_BLOCK else scale)).flatten(-2)
