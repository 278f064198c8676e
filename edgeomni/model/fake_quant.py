"""The torch model holding what an export stores, and computing as its kernels do: the gate's reference.

Weights become quantize-then-dequantize of themselves. Kernels that quantize activations are imitated in front of
each linear layer: MatMulNBits at accuracy level 4 (int8, symmetric, one scale per `block` inputs of a position) and
DynamicQuantizeMatMul (uint8 with zero point, one scale per tensor, as ONNX DynamicQuantizeLinear).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import F32, I64
from ..quantize.policy import scheme_of
from ..quantize.schemes import Scheme, dequantize, quantize

if TYPE_CHECKING:
    from .omni import OmniModel

PREFIXES = {"encoder": ("encoder.", "adapter."), "llm": ("body.", "tts.", "embedding.", "text_head.", "audio_head.")}
_ROUNDING = 1e-6
"""Relative difference of a linear layer's inputs between two correct float32 implementations."""
_HEADS = {"text_logits": "text_head", "audio_logits": "audio_head"}


@contextmanager
def as_exported(
    model: OmniModel, component: str, schemes: Mapping[str, Scheme], *, rounding: Collection[str]
) -> Iterator[None]:
    """Within the context `model`'s encoder or llm computes what its export should; afterwards all is as before.

    In the tensor groups in `rounding` the kernels' activation quantization is imitated.
    """
    with ExitStack() as undo, torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(PREFIXES[component]):
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = _stored_parameter(model, name, parameter.data, schemes)
        rounded = {group: scheme for group, scheme in schemes.items() if group in rounding}
        undo.enter_context(_changed_inputs(model, component, rounded, _kernel_input))
        yield


@contextmanager
def jittered(model: OmniModel, component: str, schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Within the context the inputs of every linear layer are shaken, to show how far that alone reaches.

    They are multiplied by 1 + 1e-6 * N(0, 1): as much as two correct float32 implementations differ.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(x: Tensor, _: Scheme) -> Tensor:
        return x * (1 + _ROUNDING * torch.randn(x.shape, generator=generator)).to(x)

    with _changed_inputs(model, component, schemes, shake):
        yield


@contextmanager
def _changed_inputs(
    model: OmniModel, component: str, schemes: Mapping[str, Scheme], change: Callable[[Tensor, Scheme], Tensor]
) -> Iterator[None]:
    """Puts change(input, scheme) in front of every linear layer and head that has a scheme."""
    with ExitStack() as undo:
        for name, module in model.named_modules():
            scheme = scheme_of(f"{name}.weight", schemes)
            if isinstance(module, nn.Linear) and name.startswith(PREFIXES[component]) and scheme is not None:
                handle = module.register_forward_pre_hook(
                    lambda _, args, scheme=scheme: (change(args[0], scheme),), prepend=True
                )
                undo.callback(handle.remove)
        for method, group in _HEADS.items():
            if component != "llm" or group not in schemes:
                continue
            inner, scheme = getattr(model, method), schemes[group]
            undo.callback(_restore, model, method, vars(model).get(method))
            setattr(model, method, lambda h, inner=inner, scheme=scheme: inner(change(h, scheme)))
        yield


def _restore(model: OmniModel, method: str, shadow: Callable[..., Tensor] | None) -> None:
    """Back to the method of the class, or to what an outer context had put over it."""
    if shadow is None:
        delattr(model, method)
    else:
        setattr(model, method, shadow)


def _stored_parameter(model: OmniModel, name: str, weight: Tensor, schemes: Mapping[str, Scheme]) -> Tensor:
    if name == "embedding.weight":
        parts = weight.split([model.spec.layout.text_vocab, len(weight) - model.spec.layout.text_vocab])
        groups = ["embedding", "embedding"]
        if model.spec.tied:  # rows that a head shares are stored as the head's
            groups = ["text_head", "embedding" if model.spec.tts_layers else "audio_head"]
        kept = [stored(rows, schemes[group]) for rows, group in zip(parts, groups, strict=True)]
        return weight if all(a is b for a, b in zip(kept, parts, strict=True)) else torch.cat(kept)
    return stored(weight, scheme_of(name, schemes) or Scheme("fp32"))


def stored(weight: Tensor, scheme: Scheme) -> Tensor:
    """What is left of a weight [n, k] after storing it: same shape, dtype and device; itself at fp32."""
    if scheme.kind == "fp32":
        return weight
    kept = torch.from_numpy(dequantize(quantize(weight.detach().float().cpu().numpy(), scheme)))
    return kept.to(weight.device, weight.dtype)


def offline_codec(model: OmniModel) -> Callable[[Sequence[I64]], F32]:
    """The checkpoint's own decoder: codes per level, [n * ids_per_level] -> wave [S], all at once, noise off."""

    def decode(codes: Sequence[I64]) -> F32:
        with torch.no_grad():
            wave = model.decode_codes([torch.from_numpy(c)[None].to(model.device) for c in codes])
        return np.asarray(wave.cpu().numpy())

    return decode


def double_codec(model: OmniModel) -> Callable[[Sequence[I64]], F32]:
    """The checkpoint's own decoder in float64; widening and narrowing leaves its float32 weights as they were."""
    single = offline_codec(model)

    def decode(codes: Sequence[I64]) -> F32:
        model.codec.double()
        try:
            return single(codes)
        finally:
            model.codec.float()

    return decode


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Within the context torch computes with that many threads (None: as it is)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kernel_input(x: Tensor, scheme: Scheme) -> Tensor:
    if scheme.blocked:
        return quantized_by_block(x, scheme.block)
    return quantized_by_tensor(x) if scheme.kind == "int8_dynamic" else x


def quantized_by_block(x: Tensor, block: int) -> Tensor:
    """x [.., k] as MatMulNBits sees it at accuracy level 4: int8, scale = absmax / 127 per `block` inputs."""
    k = x.shape[-1]
    blocks = nn.functional.pad(x, (0, -k % block)).unflatten(-1, (-1, block))
    peak = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, torch.zeros_like(peak))
    return ((blocks * inverse).round() * (peak / 127)).flatten(-2)[..., :k]


def quantized_by_tensor(x: Tensor) -> Tensor:
    """x as DynamicQuantizeMatMul sees it: uint8 over [min(x, 0), max(x, 0)], zero point rounded."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    if scale == 0:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
