"""LoRA by peft, and the way back: which modules learn, wrapping them, and making one model of what was learned.

RUN/adapter is peft's own format plus `edgeomni.json`, which says what it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..errors import TrainError
from ..model.omni import OmniModel
from ..outputs import new_directory
from ..schema import Source, parse_json, read_bytes
from .config import Mode, Part, PeftConfig
from .ctc import CtcHead
from .stages import NEVER, lora_layers
from .trainable import TrainableOmni

ORIGIN = "edgeomni.json"
_MODULES: dict[Part, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "adapter": ("adapter",),
    "words": ("tables.words", "tables.words_head"),
    "specials": ("tables.specials", "tables.specials_head"),
    "audio": ("tables.audio", "tables.audio_head"),
    "tts": ("tts",),
    "body": ("body",),
}


def prepared(model: TrainableOmni, modes: Mapping[Part, Mode], peft: PeftConfig) -> nn.Module:
    """The model with what learns set to learn: itself, or peft's wrapper around it where a part learns by LoRA."""
    whole = [name for name, module in _wanted(model, modes, "train") if module is not None]
    pattern = _lora_pattern(modes, peft.targets)
    if pattern is None:
        for name in whole:
            model.get_submodule(name).requires_grad_(True)
        result: nn.Module = model
    else:
        if model.ctc is not None:
            whole.append("ctc")
        result = get_peft_model(model, _lora_config(peft, pattern, whole))
    for name, parameter in result.named_parameters():
        if NEVER in name:
            parameter.requires_grad_(False)
    return result


def trainable_numbers(model: nn.Module) -> dict[str, int]:
    """Part -> how many numbers learn in it; the CTC head counts with the encoder."""
    found: dict[str, int] = {}
    places = {name: part for part, names in _MODULES.items() for name in names} | {"ctc": "encoder"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.")
            part = next(part for place, part in places.items() if plain.startswith(f"{place}."))
            found[part] = found.get(part, 0) + parameter.numel()
    return found


def merged(model: nn.Module, omni: OmniModel) -> OmniModel:
    """Puts what was learned into `omni` and returns it: LoRA merged, blocks joined. `model` is not used afterwards."""
    trained = model.merge_and_unload() if isinstance(model, PeftModel) else model
    assert isinstance(trained, TrainableOmni)
    omni.encoder, omni.adapter, omni.body, omni.tts = trained.encoder, trained.adapter, trained.body, trained.tts
    trained.tables.join(omni)
    for parameter in omni.parameters():
        parameter.requires_grad_(False)
    return omni.to(omni.device).eval()  # what was trained may lie on another device than the tables, which stayed


def save_adapter(model: nn.Module, directory: Path, origin: Mapping[str, Any]) -> None:
    """Writes peft's files and `origin`, whole or not at all. Does nothing for a model without LoRA."""
    if not isinstance(model, PeftModel):
        return
    with new_directory(directory, lambda _: "") as stage:
        model.save_pretrained(str(stage), save_embedding_layers=False)
        (stage / "README.md").unlink(missing_ok=True)  # peft's template of a model card says nothing
        (stage / ORIGIN).write_text(json.dumps(dict(origin), indent=1) + "\n", encoding="utf-8")


def read_origin(adapter: Path) -> dict[str, Any]:
    """What the adapter belongs to. Raises TrainError for a folder that is no adapter of EdgeOmni's."""
    source = Source(str(adapter / ORIGIN), TrainError, "give RUN or RUN/adapter of an `edgeomni train` with LoRA")
    return parse_json(read_bytes(adapter / ORIGIN, source), source)


def load_adapter(model: TrainableOmni, adapter: Path) -> PeftModel:
    """`model` with the adapter on it. Raises TrainError where it does not fit."""
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except Exception as exc:  # peft, safetensors and torch raise a dozen kinds over files that do not fit
        raise TrainError(
            f"{adapter}: does not fit this checkpoint ({exc}); merge it with the one it was trained on"
        ) from exc


def _wanted(model: TrainableOmni, modes: Mapping[Part, Mode], mode: Mode) -> list[tuple[str, nn.Module | None]]:
    names = [name for part, names in _MODULES.items() if modes[part] == mode for name in names]
    return [(name, _module(model, name)) for name in names]


def _module(model: nn.Module, name: str) -> nn.Module | None:
    for step in name.split("."):
        model = getattr(model, step)
        if model is None:
            return None
    return model


def _lora_pattern(modes: Mapping[Part, Mode], targets: list[str]) -> str | None:
    """What peft matches whole module names with; None without LoRA. Raises TrainError for targets that no part has."""
    parts = [part for part, mode in modes.items() if mode == "lora"]
    layers = {part: lora_layers(part, targets) for part in parts}
    if parts and not any(layers.values()):
        raise TrainError(f"peft.targets {targets} are no linear layers of {', '.join(parts)}")
    patterns = [rf"{part}\.layers\.\d+\.(?:\w+\.)*(?:{'|'.join(names)})" for part, names in layers.items() if names]
    return "|".join(patterns) or None


def _lora_config(peft: PeftConfig, pattern: str, whole: list[str]) -> LoraConfig:
    return LoraConfig(
        r=peft.rank,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        use_rslora=peft.rslora,
        target_modules=pattern,
        modules_to_save=whole or None,
    )


def ctc_head_of(model: nn.Module) -> CtcHead | None:
    """The CTC head of a model that was trained and merged, None where it has none."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(inner, "ctc", None)
    return head if isinstance(head, CtcHead) else None
