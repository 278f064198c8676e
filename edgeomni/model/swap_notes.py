"""What is to be told of a checkpoint whose parts were swapped: what became of each part, and what must be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..spec import OmniSpec
from . import sources

STAGES = (1, 2, 3)
NAMES = {"encoder": "encoder", "llm": "LLM", "codec": "codec"}
_ORDER = ("adapter", "TTS adapter", "special tokens", "audio rows")


@dataclass(frozen=True)
class Fit:
    """Which of the trained tensors have the sizes that the new model needs, and are kept.

    `codes`: the new codec is the old one but for its decoder, so that its codes are the old ones.
    """

    adapter: bool
    specials: bool
    audio_rows: bool
    tts: bool
    codes: bool = False


@dataclass(frozen=True)
class Notes:
    """`parts`: part -> what became of it. `stages`: stage to be run again -> why. `untrained`: the parts they train."""

    parts: dict[str, str]
    stages: dict[int, list[str]]
    untrained: list[str]


def notes_of(given: Mapping[str, str], fit: Fit, before: Mapping[str, Any], old: OmniSpec, new: OmniSpec) -> Notes:
    """`given`: the new parts' sources; `before`: the old checkpoint's provenance."""
    why: dict[int, list[str]] = {stage: [] for stage in STAGES}
    if "encoder" in given:
        _encoder(why, fit)
    if "codec" in given and not fit.codes:
        _codec(why, fit)
    if "llm" in given:
        _llm(why, fit)
    _earlier(why, before)
    stages = {stage: list(dict.fromkeys(reasons)) for stage, reasons in why.items() if reasons}
    return Notes(_parts(given, fit, old, new), stages, _untrained(given, fit, before, new))


def _encoder(why: dict[int, list[str]], fit: Fit) -> None:
    if fit.adapter:
        why[1].append("the adapter was kept, but it learned from the features of another encoder")
        return
    why[1].append("the adapter is new")
    why[3].append("the LLM has only met features of the other encoder and adapter")


def _codec(why: dict[int, list[str]], fit: Fit) -> None:
    kept = "the audio rows were kept, but the codes of another codec stand for other sounds"
    why[1].append(kept if fit.audio_rows else "the audio rows are new")
    why[3].append("spoken answers to spoken questions were learned in the codes of another codec")


def _llm(why: dict[int, list[str]], fit: Fit) -> None:
    why[1].append("the adapter was trained with another LLM" if fit.adapter else "the adapter is new")
    why[1].append("the audio rows were trained with another LLM" if fit.audio_rows else "the audio rows are new")
    why[2].append("the LLM has never answered in the form of the parallel streams")
    why[3].append("the LLM has never spoken")


def _earlier(why: dict[int, list[str]], before: Mapping[str, Any]) -> None:
    """What the checkpoint itself still had to be trained in."""
    if before.get("weights") == "trained":
        return
    waiting = {stage for stage in STAGES if str(stage) in str(before.get("stages", "")).split(", ")}
    for stage in waiting or STAGES:
        why[stage].append("the checkpoint that was swapped from had not been trained in it")


def _untrained(given: Mapping[str, str], fit: Fit, before: Mapping[str, Any], new: OmniSpec) -> list[str]:
    names = {name for name in str(before.get("untrained", "")).split(", ") if name}
    if "encoder" in given:
        names |= {"adapter"}
    if "codec" in given and not fit.codes:
        names |= {"audio rows", "TTS adapter"}
    if "llm" in given:
        names |= set(_ORDER)
    if not new.tts_layers:
        names -= {"TTS adapter"}
    return [*(name for name in _ORDER if name in names), *sorted(names - set(_ORDER))]


def _parts(given: Mapping[str, str], fit: Fit, old: OmniSpec, new: OmniSpec) -> dict[str, str]:
    told = {NAMES[name]: f"replaced by {sources.short_name(source)}" for name, source in given.items()}
    if fit.codes:
        told["codec"] += ", which has another decoder for the same codes: what speaks them stays trained"
    told["adapter"] = "kept" if fit.adapter else _new_adapter(old, new)
    told["special tokens"] = "kept" if fit.specials else "new, at the statistics of the LLM's rows"
    told["audio rows"] = "kept" if fit.audio_rows else _new_audio_rows(fit, new)
    if new.tts_layers:
        told["TTS adapter"] = "kept" if fit.tts else f"new, {new.tts_layers} layer(s)"
    elif old.tts_layers:
        told["TTS adapter"] = "left out"
    if old.chat != new.chat:
        told["chat template"] = "back at the default, since it was made for the other LLM"
    return told


def _new_adapter(old: OmniSpec, new: OmniSpec) -> str:
    sizes = [f"{spec.encoder.width} -> {spec.body.width}" for spec in (old, new)]
    if sizes[0] == sizes[1]:
        return f"new, {new.adapter.kind} in place of {old.adapter.kind}"
    return f"new: it maps {sizes[1]} now, and mapped {sizes[0]}"


def _new_audio_rows(fit: Fit, new: OmniSpec) -> str:
    whose = "the old ones (the audio specials are kept)" if fit.specials else "the LLM's rows"
    layout = new.layout
    return f"new, {layout.streams} streams of {layout.codebook_size} codes, at the statistics of {whose}"
