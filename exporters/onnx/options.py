"""What an export to ONNX can be asked for besides a precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgeomni.errors import UsageError

Flavour = Literal["ort", "portable"]
"""ort: ONNX Runtime's own fused operators. portable: standard operators (opset 24 at most), for other engines."""
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class OnnxOptions:
    """The ONNX format's own options.

    `block` counts the inputs that share a scale in the LLM's transformer blocks (None: the default of the precision);
    float precisions have no scales and ignore it. Raises UsageError for a flavour or a block that does not exist.
    """

    flavour: Flavour = "ort"
    block: int | None = None

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise UsageError(f"unknown ONNX flavour {self.flavour!r}; known are {' and '.join(FLAVOURS)}")
        if self.block is not None and self.block not in BLOCKS:
            raise UsageError(f"block {self.block!r} is not offered; known are {', '.join(map(str, BLOCKS))}")
