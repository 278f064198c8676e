"""How large a model may be: bounds that are checked before anything is allocated."""

from __future__ import annotations

import math

from .errors import SpecError
from .schema import short

LARGEST = {
    "layers": 1024,  # the deepest published decoders have about 130
    "tts_layers": 1024,
    "width": 1 << 16,  # the widest published decoders have 2^14
    "ffn": 1 << 20,
    "hidden": 1 << 20,  # of the adapter, usually the LLM's ffn
    "heads": 1024,
    "kv_heads": 1024,
    "head_dim": 1 << 16,
    "context": 1 << 20,  # frames or positions; a million frames are a day of speech
    "text_vocab": 1 << 24,  # the largest published vocabularies have 2^18
    "text_specials": 1 << 16,
    "audio_vocab": 1 << 24,
    "codebook_size": 1 << 24,
    "joint_vocab": 1 << 25,
    "streams": 1024,  # Mimi has 32
    "sample_rate": 1 << 20,  # 1 MHz
    "n_fft": 1 << 16,
    "hop": 1 << 20,
    "n_mels": 1024,
    "window_s": 3600,  # an hour
    "attn_window": 1 << 20,
    "history_turns": 1 << 20,
}
"""The largest value of each size. Each is far beyond any published model, so that only damaged or hostile files meet
it, and small enough that a product of two cannot overflow."""


def sized(where: str, *, least: int = 1, **sizes: int) -> None:
    """Raises SpecError unless each size is a whole number from `least` up to its bound in LARGEST."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SpecError(f"{where}.{name} must be a whole number of at least {least}, not {short(value)}")
        if value > LARGEST[name]:
            raise SpecError(f"{where}.{name} is {short(value)}, but no model has more than {LARGEST[name]}")


def positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise SpecError(f"{where}.{name} must be a finite number above 0, not {short(value)}")
