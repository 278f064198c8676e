"""Does OpenVINO multiply with the codes of a compressed layer, or did it make floats of them when it loaded them?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgeomni.bundle import Bundle, Component
from edgeomni.quantize.schemes import parse
from edgeomni.runtimes.openvino.models import ModelFactory

_LINEAR = ("FullyConnected", "MatMul")
_TYPES = {"int8": "i8", "int4": "i4"}


def wrong_kernels(bundle: Bundle, component: Component) -> int | None:
    """Linear layers of a component's models whose weights OpenVINO does not hold in an integer type of its schemes.

    None for the codec and for float precisions, which ask for no kernel of their own.
    """
    wanted = {_TYPES[kind] for s in component.scheme.values() if (kind := parse(s).kind) in _TYPES}
    if component.name == "codec" or not wanted:
        return None
    models = [ModelFactory().open(bundle.file(graph.path)) for graph in component.graphs.values()]
    types = [kind for model in models for kind in weight_types(model.compiled)]
    return sum(t not in wanted for t in types) + sum(t not in types for t in wanted)


def weight_types(model: Any) -> Iterator[str]:
    """The type of the constant weight of each linear layer of a compiled model, as it is executed."""
    for node in model.get_runtime_model().get_ordered_ops():
        if _of(node, "layerType") in _LINEAR:
            weights = node.input_value(1).get_node()
            if _of(weights, "layerType") == "Const":
                yield _of(weights, "runtimePrecision")


def _of(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""
