"""Codes of the LLM's blocks chosen by what the model computes with them, on turns that it was asked to take.

Rounding to nearest treats every weight alike. Here each weight's rounding error is made good, as far as it can be, by
the weights of its row that are still to be rounded, so that the layer's outputs on the turns change as little as
possible: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, arXiv 2210.17323). Blocks of the transformer are taken one after
the other, each with the inputs that the blocks before it give once they are rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import F32
from ..errors import DataError
from .policy import scheme_of
from .schemes import Packed, Scheme, code_range, dequantize, has_codes_by_block, kind_of, packed_codes

if TYPE_CHECKING:
    from ..model.omni import OmniModel

Say = Callable[[str], None]
DAMPING = 0.01
"""Part of the mean squared input that is added to each input's, as in the paper: for inputs that hardly vary."""
_GROUPS = ("body.linear", "tts.linear")


@contextmanager
def choosing(model: OmniModel, turns: Sequence[Tensor], progress: Say = lambda _: None) -> Iterator[None]:
    """Within the context exports of `model`, and the gate, take codes that are chosen by `turns`.

    `turns`: what the body reads in each, float32 [T, D]. The codes are chosen when an export first asks for them, once
    for each scheme: it takes minutes for a large model. Raises DataError then for turns whose values are not finite.
    """
    found: dict[Scheme, dict[str, Packed]] = {}

    def chosen(name: str, scheme: Scheme) -> Packed | None:
        if scheme_of(name, dict.fromkeys(_GROUPS, scheme)) is None or not has_codes_by_block(scheme):
            return None
        if scheme not in found:
            found[scheme] = choose(model, turns, scheme, progress)
        return found[scheme][name]

    before, model.chosen_codes = model.chosen_codes, chosen
    try:
        yield
    finally:
        model.chosen_codes = before


@torch.inference_mode()
def choose(
    model: OmniModel, turns: Sequence[Tensor], scheme: Scheme, progress: Say = lambda _: None
) -> dict[str, Packed]:
    """Parameter name -> codes, for all linear layers of the body and of the TTS adapter, which goes on from the body.

    The model is left as it is. `progress` is told each block. Raises DataError where the turns' values are not finite.
    """
    found: dict[str, Packed] = {}
    stacks = {"body": model.body.layers, "tts": model.tts.layers if model.tts is not None else ()}
    blocks = [(f"{stack}.layers.{i}", layer) for stack, layers in stacks.items() for i, layer in enumerate(layers)]
    inputs = [turn[None].to(model.device) for turn in turns]
    for i, (name, layer) in enumerate(blocks):
        progress(f"calibrate: block {i + 1} of {len(blocks)}")
        rounded = copy.deepcopy(layer)
        products = _products(model, rounded, inputs)
        for part, linear in _linears(rounded):
            full = f"{name}.{part}.weight"
            found[full] = with_feedback(linear.weight.float().cpu().numpy(), products[part], scheme)
            linear.weight.data = torch.from_numpy(dequantize(found[full])).to(linear.weight)
        if i + 1 < len(blocks):
            inputs = [_run(model, rounded, x) for x in inputs]
    return found


def with_feedback(w: F32, products: Tensor, scheme: Scheme) -> Packed:
    """w [n, k] -> codes such that the sum over inputs x of |(w - codes * scales) x|^2 is small.

    `products` [k, k] float64: the sum of x x^T. Columns are rounded one after the other, and the error of each is
    spread over the later ones. A block's scales are those that rounding to nearest would take, of what its weights have
    become by then. Raises DataError where `products` are not finite.
    """
    scales_of = kind_of(scheme.kind).block_scales
    assert scales_of is not None
    factor, rest = _factor(products), torch.from_numpy(w).double()
    (n, k), (lowest, highest) = w.shape, code_range(scheme)
    codes, scales = torch.empty(n, k, dtype=torch.int8), list[F32]()
    for start in range(0, k, scheme.block):
        end = min(start + scheme.block, k)
        x, errors = rest[:, start:end], torch.empty(n, end - start, dtype=torch.float64)
        scales.append(scales_of(x.float().numpy(), scheme))
        scale = torch.from_numpy(scales[-1]).double()
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        for j in range(end - start):
            code = (x[:, j] * inverse).round().clamp(lowest, highest)
            codes[:, start + j] = code.to(torch.int8)
            errors[:, j] = (x[:, j] - code * scale) / factor[start + j, start + j]
            x[:, j + 1 :] -= torch.outer(errors[:, j], factor[start + j, start + j + 1 : end])
        rest[:, end:] -= errors @ factor[start:end, end:]
    return packed_codes(codes.numpy(), np.stack(scales, axis=1), scheme)


def _factor(products: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (damped products)^-1, which holds the weights of the feedback.

    With J the reversal of order and J H J = L L^T, R = J L J is upper triangular and H = R R^T, so that U = R^-1.
    """
    lower, mean = None, float(products.diagonal().double().mean())
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):  # more only where rounding made the products indefinite
        damped = products.double().flip(0, 1)
        damped.diagonal().add_(damping * mean or 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower).all():
            identity = torch.eye(len(lower), dtype=torch.float64)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    raise DataError("the calibration turns make the model compute values that are not finite; give other questions")


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _products(model: OmniModel, layer: nn.Module, turns: Sequence[Tensor]) -> dict[str, Tensor]:
    """Linear layer -> the sum of x x^T over its inputs x, float64 [k, k]; layers that read the same share it."""
    sums: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    last: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        before = next((other for other, seen in last.items() if seen is x), None)
        if before is not None:
            source[name] = before
            return
        last.clear()
        last[name] = x
        flat = x.flatten(0, -2).float()
        product = (flat.T @ flat).cpu().double()
        sums[name] = sums[name].add_(product) if name in sums else product

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: add(name, args[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in _linears(layer)]
    try:
        for x in turns:
            _run(model, layer, x)
    finally:
        for handle in handles:
            handle.remove()
    return sums | {name: sums[other] for name, other in source.items()}


def _run(model: OmniModel, layer: nn.Module, x: Tensor) -> Tensor:
    """One block on a whole turn [1, T, D]."""
    from ..model.bodies import run_layers

    return run_layers(nn.ModuleList([layer]), model.body.rotary_emb, x, None)
