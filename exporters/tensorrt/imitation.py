"""torch computing as the TensorRT graphs compute: weights as stored, products, attention and caches in half."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.model import fake_quant
from edgeomni.quantize import tensorrt_kinds  # makes the kinds known  # noqa: F401
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Scheme

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


@contextmanager
def as_exported(model: OmniModel, component: Component, *, exact: bool, root: Path | None = None) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` computes as `component`'s graphs do.

    With `exact` it computes as the graphs do when all of their half precision is widened to float32.
    """
    schemes = stored.schemes(component)
    with fake_quant.holding_stored_weights(model, component.name, schemes), ExitStack() as half:
        if not exact and rounds_inputs(component):
            half.enter_context(fake_quant.changed_inputs(model, component.name, schemes, lambda x, _: _half(x)))
            half.enter_context(_half_products(model, component.name, schemes))
            half.enter_context(_HalfAttention())
        yield


def rounds_inputs(component: Component) -> bool:
    """Whether products take their inputs in half precision, so that the exact mode differs."""
    return component.precision != "fp32"


@contextmanager
def _half_products(model: OmniModel, component: str, schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Within the context linear layers multiply with weights in half, and round before they add the bias."""
    with ExitStack() as undo:
        for name, module in model.named_modules():
            scheme = scheme_of(f"{name}.weight", schemes)
            if isinstance(module, nn.Linear) and name.startswith(fake_quant.PREFIXES[component]) and scheme is not None:
                undo.callback(setattr, module.weight, "data", module.weight.data)
                module.weight.data = _half(module.weight.data)
                undo.callback(module.register_forward_hook(_rounded_product).remove)
        yield


def _rounded_product(layer: nn.Module, _: Any, y: Tensor) -> Tensor:
    bias = layer.bias
    return _half(y) if bias is None else _half(y - bias) + bias


class _HalfAttention(TorchFunctionMode):
    """While it is entered, attention sees queries, keys and values in half precision: the caches hold them so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            args = (*(_half(x) for x in args[:3]), *args[3:])
        return func(*args, **(kwargs or {}))


def _half(x: Tensor) -> Tensor:
    return x.half().to(x)
