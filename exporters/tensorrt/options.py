"""What an export to TensorRT can be asked for besides a precision."""

from __future__ import annotations

from dataclasses import dataclass

from edgeomni.errors import UsageError
from edgeomni.tensorrt_targets import parse_targets

BLOCKS = (16, 32, 64, 128)
"""Inputs per scale that TensorRT's weight-only products take."""
LEAST_CACHE, MOST_CACHE = 16, 1 << 16


@dataclass(frozen=True)
class TensorRtOptions:
    """The TensorRT format's own options.

    `target`: the GPUs to build engines for, "sm_89,sm_120"; "" builds none, and leaves that to the first run on the
    device. `cache`: frames that the KV cache holds, which TensorRT wants to know when it builds (None: the model's
    context). `block`: inputs that share a scale at INT4 and INT8 (None: the largest that divides the model's widths).
    Raises UsageError for targets, caches and blocks that do not exist.
    """

    target: str = ""
    cache: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.target:
            parse_targets(self.target)
        if self.block is not None and self.block not in BLOCKS:
            raise UsageError(f"block {self.block!r} is not offered; known are {', '.join(map(str, BLOCKS))}")
        if self.cache is not None and not LEAST_CACHE <= self.cache <= MOST_CACHE:
            raise UsageError(f"a cache of {self.cache} frames is not offered; take {LEAST_CACHE} to {MOST_CACHE}")

    @property
    def targets(self) -> tuple[str, ...]:
        return parse_targets(self.target) if self.target else ()
