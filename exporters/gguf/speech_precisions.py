"""The precisions of encoder and codec in GGUF: tensor group -> scheme."""

from __future__ import annotations

from edgeomni.errors import UsageError
from edgeomni.quantize import gguf_kinds  # makes the kinds known  # noqa: F401
from edgeomni.quantize.policy import groups_of
from edgeomni.quantize.schemes import Scheme

ENCODER = ("fp32", "f16", "bf16", "q8_0")
CODEC = ("fp32", "f16")
_KINDS = {"f16": "fp16"}
"""GGUF's own names of our kinds, where they differ."""


def speech_schemes(component: str, precision: str) -> dict[str, Scheme]:
    """Tensor group -> scheme of "encoder" or "codec". Raises UsageError for a precision that is not offered."""
    return encoder_schemes(precision) if component == "encoder" else codec_schemes(precision)


def encoder_schemes(precision: str) -> dict[str, Scheme]:
    """Raises UsageError for fewer than 8 bits, which are the speech encoder's floor, and for unknown names.

    Q4_0 gave features with a cosine of 0.944 to the original's at Whisper-small's shape (random weights).
    """
    return _schemes("encoder", precision, ENCODER, "8 bits are the speech encoder's floor; use encoder q8_0")


def codec_schemes(precision: str) -> dict[str, Scheme]:
    """Raises UsageError for integers and unknown names: Q8_0 gave 27 dB and Q4_0 noise, and neither is faster."""
    return _schemes("codec", precision, CODEC, "integers make the codec audibly worse; use codec fp32 or f16")


def _schemes(component: str, precision: str, offered: tuple[str, ...], why: str) -> dict[str, Scheme]:
    name = "f16" if precision == "fp16" else precision
    if name in offered:
        return dict.fromkeys(groups_of(component), Scheme(_KINDS.get(name, name)))
    lower = name.startswith(("q", "iq")) or name == "bf16"
    reason = why if lower else f"known are {', '.join(offered)}"
    raise UsageError(f"{component}:{precision} is not offered as gguf: {reason}")
