"""What an export to OpenVINO can be asked for besides a precision."""

from __future__ import annotations

from dataclasses import dataclass

from edgeomni.errors import UsageError

BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class OpenVinoOptions:
    """The OpenVINO format's own options.

    `block` counts the inputs that share a scale in the LLM's transformer blocks (None: the default of the precision).
    `fast`: encoder and LLM may compute with what this CPU has beside float32 (fast.py). Raises UsageError for a block
    that does not exist, and for `fast` where it has nothing; EngineError where OpenVINO is not installed to tell.
    """

    block: int | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if self.block is not None and self.block not in BLOCKS:
            raise UsageError(f"block {self.block!r} is not offered; known are {', '.join(map(str, BLOCKS))}")
        if self.fast:
            from edgeomni.exporters.openvino import fast

            fast.check()
