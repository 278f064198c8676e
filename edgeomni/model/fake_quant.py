"""An OmniModel that computes, for a while, with the weights that an export stores and the inputs that its kernels see.

Weights become quantize-then-dequantize of themselves; a function of the caller's choosing changes what goes into each
linear layer. What a particular format's kernels do to those inputs is told by that format's folder in exporters/.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Component -> prefixes of its parameters' names."""
FLOAT32_ROUNDING = 1e-6
"""Relative difference of a linear layer's inputs between two correct float32 implementations."""
_HEADS = {"text_logits": "text_head", "audio_logits": "audio_head"}
Change = Callable[[Tensor, Scheme], Tensor]
Decode = Callable[[Sequence[I64]], F32]


@contextmanager
def holding_stored_weights(
    model: OmniModel, component: str, schemes: Mapping[str, Scheme], importance: Mapping[str, F32] | None = None
) -> Iterator[None]:
    """Within the context the "encoder" or "llm" of `model` holds what quantizing by `schemes` leaves of its weights.

    `importance` maps parameters' names to how much errors in their inputs matter (schemes.quantize). Where the model
    has `chosen_codes`, these count.
    """
    with ExitStack() as undo, torch.no_grad():
        ours = [(name, p) for name, p in model.named_parameters() if name.startswith(PREFIXES[component])]
        # All of them first: codes that are chosen by what the model computes need the model as it is.
        kept = [_stored_parameter(model, name, p.data, schemes, importance or {}) for name, p in ours]
        for (_, parameter), data in zip(ours, kept, strict=True):
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = data
        del kept
        yield


@contextmanager
def changed_inputs(model: OmniModel, component: str, schemes: Mapping[str, Scheme], change: Change) -> Iterator[None]:
    """Within the context `change(input, scheme)` stands before every linear layer and head that has a scheme."""
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


@contextmanager
def jittered(model: OmniModel, component: str, schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Within the context the inputs of every linear layer are multiplied by 1 + 1e-6 * N(0, 1).

    That is as much as two correct float32 implementations differ, so that the effect shows what rounding alone does.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(x: Tensor, _: Scheme) -> Tensor:
        return x * (1 + FLOAT32_ROUNDING * torch.randn(x.shape, generator=generator)).to(x)

    with changed_inputs(model, component, schemes, shake):
        yield


def stored(weight: Tensor, scheme: Scheme, importance: F32 | None = None) -> Tensor:
    """What is left of a weight [n, k] after storing it: same shape, dtype and device; the weight itself at fp32."""
    if scheme.kind == "fp32":
        return weight
    kept = torch.from_numpy(dequantize(quantize(weight.detach().float().cpu().numpy(), scheme, importance)))
    return kept.to(weight.device, weight.dtype)


def offline_codec(model: OmniModel) -> Decode:
    """The checkpoint's own decoder: codes per level, [n * ids_per_level] -> wave [S], all at once, noise off."""

    def decode(codes: Sequence[I64]) -> F32:
        with torch.no_grad():
            wave = model.decode_codes([torch.from_numpy(c)[None].to(model.device) for c in codes])
        return np.asarray(wave.cpu().numpy())

    return decode


def double_codec(model: OmniModel) -> Decode:
    """The checkpoint's own decoder in float64, on a copy: the wave [S] is float64.

    transformers' MimiEuclideanCodebook keeps its table in a cache (`_embed`) that `.double()` does not reach, so the
    copy's caches are emptied.
    """
    twin = copy.copy(model)
    twin._modules = {**model._modules, "codec": copy.deepcopy(model.codec).double()}
    for module in twin.codec.modules():
        if getattr(module, "_embed", None) is not None:
            module._embed = None
    decode = offline_codec(twin)

    def checked(codes: Sequence[I64]) -> F32:
        wave = decode(codes)
        assert wave.dtype == np.float64, "the float64 yardstick must not be computed in float32"
        return wave

    return checked


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Within the context torch computes with that many threads (None: as it is)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _restore(model: OmniModel, method: str, shadow: Callable[..., Tensor] | None) -> None:
    """Back to the method of the class, or to what an outer context had put over it."""
    if shadow is None:
        delattr(model, method)
    else:
        setattr(model, method, shadow)


def _stored_parameter(
    model: OmniModel, name: str, weight: Tensor, schemes: Mapping[str, Scheme], importance: Mapping[str, F32]
) -> Tensor:
    if name == "embedding.weight":
        parts = weight.split([model.spec.layout.text_vocab, len(weight) - model.spec.layout.text_vocab])
        groups = ["embedding", "embedding"]
        if model.spec.tied:  # rows that a head shares are stored as the head's
            groups = ["text_head", "embedding" if model.spec.tts_layers else "audio_head"]
        kept = [stored(rows, schemes[group]) for rows, group in zip(parts, groups, strict=True)]
        return weight if all(a is b for a, b in zip(kept, parts, strict=True)) else torch.cat(kept)
    scheme = scheme_of(name, schemes) or Scheme("fp32")
    codes = model.chosen_codes(name, scheme) if model.chosen_codes else None
    if codes is not None:
        return torch.from_numpy(dequantize(codes)).to(weight.device, weight.dtype)
    return stored(weight, scheme, importance.get(name))
