"""Inputs that the streaming codec graph of exporters/onnx/codec.py has besides codes, states and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def edge_values(meta: Mapping[str, Any], first: int, last: int) -> dict[str, NDArray[Any]]:
    """Those that depend only on whether a push is the stream's first and whether it is its last (1) or not (0).

    `meta` is the component's: zeros for the tails of its layers, and how many outputs of a layer count.
    """
    values: dict[str, NDArray[Any]] = {
        tail["name"]: np.zeros((1, tail["channels"], tail["length"] * last), np.float32) for tail in meta["tails"]
    }
    for bound in meta["bounds"]:
        here = {"first": first, "last": last}[bound["push"]]
        values[bound["name"]] = np.array([bound["then" if here else "otherwise"]], np.int64)
    return values
