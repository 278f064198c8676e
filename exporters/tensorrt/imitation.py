"""torch computing as the TensorRT graphs compute: weights as stored; products, attention and caches in a narrow type.

Inputs of products with static weights (int8_static, fp8_static) are rounded to the weights' type as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.model import fake_quant
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Scheme
from edgeomni.quantize.tensorrt_kinds import LARGEST_CODE

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


Round = Callable[[Tensor], Tensor]


@contextmanager
def as_exported(model: OmniModel, component: Component, *, exact: bool, root: Path | None = None) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` computes as `component`'s graphs do.

    With `exact` it computes as the graphs do when they are widened to float32 and round no inputs.
    """
    schemes = stored.schemes(component)
    with fake_quant.holding_stored_weights(model, component.name, schemes), ExitStack() as narrow:
        if not exact and component.precision != "fp32":
            inputs = component.meta.get("input_scales", {})
            # the hook that is entered last runs first: products see inputs in half, rounded further where scales are
            narrow.enter_context(_rounded_inputs(model, inputs, schemes))
            narrow.enter_context(fake_quant.changed_inputs(model, component.name, schemes, _narrowed))
            narrow.enter_context(_narrow_products(model, component.name, schemes))
            narrow.enter_context(_NarrowAttention(_bfloat16 if component.precision == "bf16" else _half))
        yield


def rounds_inputs(component: Component) -> bool:
    """Whether products take their inputs in half precision, so that the exact mode differs."""
    return component.precision != "fp32"


@contextmanager
def _rounded_inputs(model: OmniModel, inputs: Mapping[str, float], schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Within the context the layers named by `inputs` see theirs as codes of 8 bits times the scale given."""
    with ExitStack() as undo:
        for name, scale in inputs.items():
            scheme = scheme_of(f"{name}.weight", schemes)
            assert scheme is not None
            hook = _rounder(scale, scheme.kind)
            undo.callback(model.get_submodule(name).register_forward_pre_hook(hook, prepend=True).remove)
        yield


def _rounder(scale: float, kind: str) -> Callable[[Any, Any], tuple[Tensor]]:
    most = LARGEST_CODE[kind]
    least = -128.0 if kind == "int8_static" else -most  # inputs, other than weights, may have the lowest code

    def rounded(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        codes = torch.clamp(args[0] / scale, least, most)
        codes = codes.to(torch.float8_e4m3fn).to(codes) if kind == "fp8_static" else codes.round()
        return (codes * scale,)

    return rounded


@contextmanager
def _narrow_products(model: OmniModel, component: str, schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Within the context linear layers multiply with narrow weights, and round before they add the bias.

    Codes of 8 bits times such codes are exact, so that static weights are not rounded.
    """
    with ExitStack() as undo:
        for name, module in model.named_modules():
            scheme = scheme_of(f"{name}.weight", schemes)
            if isinstance(module, nn.Linear) and name.startswith(fake_quant.PREFIXES[component]) and scheme is not None:
                undo.callback(setattr, module.weight, "data", module.weight.data)
                if scheme.category != "static":
                    module.weight.data = _narrowed(module.weight.data, scheme)
                undo.callback(module.register_forward_hook(_rounded_product(scheme)).remove)
        yield


def _rounded_product(scheme: Scheme) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def rounded(layer: nn.Module, _: Any, y: Tensor) -> Tensor:
        bias = layer.bias
        return _narrowed(y, scheme) if bias is None else _narrowed(y - bias, scheme) + bias

    return rounded


class _NarrowAttention(TorchFunctionMode):
    """While it is entered, attention sees narrow queries, keys and values: the caches hold them so."""

    def __init__(self, to_narrow: Round) -> None:
        super().__init__()
        self._to_narrow = to_narrow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            args = (*(self._to_narrow(x) for x in args[:3]), *args[3:])
        return func(*args, **(kwargs or {}))


def _narrowed(x: Tensor, scheme: Scheme) -> Tensor:
    """x in the type that products with weights of this scheme compute in."""
    return _bfloat16(x) if scheme.kind == "bf16" else _half(x)


def _half(x: Tensor) -> Tensor:
    return x.half().to(x)


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x)
