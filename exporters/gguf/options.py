"""What an export to GGUF can be asked for besides a precision."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeomni.errors import UsageError

HEAD_PRECISIONS = ("fp32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "q6_k", "q4_k")


@dataclass(frozen=True)
class GgufOptions:
    """The GGUF format's own options.

    `heads`: the precision of the text head, the audio heads and the embedding (None: q8_0 where the body is quantized,
    else the body's). `imatrix`: a file of llama.cpp's importance matrix, which weighs the errors of the body's
    quantized tensors (None: all inputs weigh alike). Raises UsageError for a precision that does not exist.
    """

    heads: str | None = None
    imatrix: str | None = field(default=None, metadata={"path": True})

    def __post_init__(self) -> None:
        if self.heads is not None and self.heads not in HEAD_PRECISIONS:
            raise UsageError(f"heads {self.heads!r} are not offered; known are {', '.join(HEAD_PRECISIONS)}")
