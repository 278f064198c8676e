"""What a trained checkpoint says about where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Part, TrainConfig
from .stages import modes_of

_PART_OF: dict[str, Part] = {
    "encoder": "encoder",
    "adapter": "adapter",
    "LLM": "body",
    "text rows": "words",
    "special tokens": "specials",
    "audio rows": "audio",
    "TTS adapter": "tts",
}
"""What a provenance's list of untrained parts calls them -> the part that learns."""
_LICENSED: dict[str, tuple[Part, ...]] = {
    "encoder": ("encoder",),
    "llm": ("adapter", "words", "specials", "audio", "tts", "body"),
}
"""Whose licence a checkpoint states -> the parts of the model that belong to it."""
_RANDOM = "random weights"
TRAINED_FROM_RANDOM = "trained from random weights; whoever trained it chooses the licence"
_ALL_RANDOM = "encoder, adapter, LLM, text rows, special tokens, audio rows"
"""What is untrained of a preset with random weights."""


def provenance_of(origin: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The provenance of what a run makes of a checkpoint with the provenance `origin`.

    What was untrained stays named, and the weights count as random, until a stage has taught it.
    """
    kept = {k: v for k, v in origin.items() if k not in ("source_hash", "untrained", "stages", "tools", "command")}
    left = untrained_after(origin, config)
    before = str(origin.get("trained_in", ""))
    return {
        **kept,
        **({"untrained": left} if left else {}),
        "weights": "random" if left else "trained",
        "trained_in": f"{before}, {config.stage}" if before else config.stage,
        "trained_from": str(origin.get("source_hash", "")),
    }


def licences_of(licences: Mapping[str, str], config: TrainConfig) -> dict[str, str]:
    """The licences of what a run makes of a checkpoint with these: those of random weights that it taught change."""
    modes = modes_of(config)
    learns = {name: any(modes[part] != "freeze" for part in parts) for name, parts in _LICENSED.items()}
    return {
        name: TRAINED_FROM_RANDOM if learns.get(name) and text.startswith(_RANDOM) else text
        for name, text in licences.items()
    }


def untrained_after(origin: Mapping[str, Any], config: TrainConfig) -> str:
    """The parts that were untrained and that this run has not taught either, as "adapter, audio rows"."""
    modes = modes_of(config)
    default = _ALL_RANDOM if origin.get("kind") == "preset" and "trained_in" not in origin else ""
    names = [name for name in str(origin.get("untrained", default)).split(", ") if name]
    return ", ".join(name for name in names if name not in _PART_OF or modes[_PART_OF[name]] == "freeze")
