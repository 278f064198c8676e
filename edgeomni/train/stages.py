"""Which part learns in which stage, and the proof afterwards that nothing else has moved.

    part      1         2        3        end-to-end   ctc
    encoder   freeze    freeze   freeze   freeze       train
    adapter   train     freeze   train    train        freeze
    words     freeze    freeze   freeze   freeze       freeze
    specials  freeze    train    train    train        freeze
    audio     train     freeze   train    train        freeze
    tts       train     freeze   train    train        freeze
    body      freeze    lora     lora     lora         freeze

Stages 1 to 3 are Mini-Omni's (arXiv 2408.16725, section 3.3): modality alignment, adaption, multimodal finetuning.
"ctc" teaches the speech encoder alone. `specials` are the rows that mark the ends of text and the tasks: they belong
to the LLM, and are new where the model was composed of parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from rich.table import Table
from torch import Tensor

from ..errors import TrainError
from ..model.omni import OmniModel
from .config import PARTS, Mode, Part, Stage, TrainConfig

_RULES: dict[Stage, dict[Part, Mode]] = {
    "1": dict(zip(PARTS, ("freeze", "train", "freeze", "freeze", "train", "train", "freeze"), strict=True)),
    "2": dict(zip(PARTS, ("freeze", "freeze", "freeze", "train", "freeze", "freeze", "lora"), strict=True)),
    "3": dict(zip(PARTS, ("freeze", "train", "freeze", "train", "train", "train", "lora"), strict=True)),
    "end-to-end": dict(zip(PARTS, ("freeze", "train", "freeze", "train", "train", "train", "lora"), strict=True)),
    "ctc": dict(zip(PARTS, ("train", "freeze", "freeze", "freeze", "freeze", "freeze", "freeze"), strict=True)),
}
NEVER = "embed_positions"
"""Whisper's positions are sinusoids (arXiv 2212.04356, section 2.2) and are never learned."""
_LORA_LAYERS = {
    "body": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "tts": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}


def modes_of(config: TrainConfig) -> dict[Part, Mode]:
    """How each part learns: the stage's rule, unless `learn` says otherwise. Without LoRA, its parts learn whole."""
    modes = {part: getattr(config.learn, part) or mode for part, mode in _RULES[config.stage].items()}
    if not config.lora:
        modes = {part: "train" if mode == "lora" else mode for part, mode in modes.items()}
    if not config.lora and config.learn.words is None and modes["body"] == "train":
        modes["words"] = "train"  # the whole LLM learns, its rows included
    if all(mode == "freeze" for mode in modes.values()):
        raise TrainError("every part is frozen, so that nothing can learn; set one to train or lora under [learn]")
    return modes


def pieces(model: OmniModel) -> dict[str, tuple[Part | None, Tensor]]:
    """Every tensor of the state dict with the part that it belongs to (None: the codec, which has its own trainer).

    The tables of embedding and text head come as blocks of rows: `embedding.weight[words]` and so on. Views, no copies.
    """
    layout = model.spec.layout
    blocks: dict[Part, slice] = {
        "words": slice(0, layout.eot),
        "specials": slice(layout.eot, layout.text_vocab),
        "audio": slice(layout.text_vocab, None),
    }
    out: dict[str, tuple[Part | None, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        top = name.partition(".")[0]
        if top in ("embedding", "text_head"):
            own = blocks if top == "embedding" else {p: blocks[p] for p in ("words", "specials")}
            out |= {f"{name}[{part}]": (part, tensor[rows]) for part, rows in own.items()}
        else:
            out[name] = ("audio" if top == "audio_head" else top if top in PARTS else None, tensor)  # type: ignore[assignment]
    return out


def lora_layers(part: Part, targets: list[str]) -> tuple[str, ...]:
    """Names of the linear layers of that part that get a LoRA: `targets`, as far as the part has them, or all."""
    return tuple(name for name in _LORA_LAYERS[part] if not targets or name in targets)


def may_move(name: str, part: Part | None, modes: Mapping[Part, Mode], targets: list[str]) -> bool:
    """Whether that piece may be another after training. Of a part with LoRA only the adapted weights are."""
    if part is None or modes[part] == "freeze" or NEVER in name:
        return False
    if modes[part] == "train":
        return True
    return name.endswith(tuple(f".{layer}.weight" for layer in lora_layers(part, targets)))


class Frozen:
    """What must not move, by hash: taken before training, compared bit for bit after it."""

    def __init__(self, model: OmniModel, modes: Mapping[Part, Mode], targets: list[str]) -> None:
        self._before = {
            name: _digest(tensor)
            for name, (part, tensor) in pieces(model).items()
            if not may_move(name, part, modes, targets)
        }

    def check(self, model: OmniModel) -> None:
        """Raises TrainError naming every frozen tensor that has another value now. That would be a defect of ours."""
        now = pieces(model)
        moved = [name for name, digest in self._before.items() if _digest(now[name][1]) != digest]
        if moved:
            raise TrainError(
                f"frozen tensors have moved: {', '.join(moved[:8])}; nothing was kept. Report this, it is a defect"
            )


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.numel() else tensor
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def part_sizes(model: OmniModel) -> dict[str, int]:
    """Part (or "codec") -> how many numbers it holds. To be asked before peft adds its own."""
    total: dict[str, int] = {}
    for part, tensor in pieces(model).values():
        total[part or "codec"] = total.get(part or "codec", 0) + tensor.numel()
    return total


def learning_table(sizes: Mapping[str, int], modes: Mapping[Part, Mode], trainable: Mapping[str, int]) -> Table:
    """What learns, before it begins: a row per part. `trainable`: part -> numbers that learn."""
    shown = {"freeze": "no", "lora": "by LoRA", "train": "whole"}
    table = Table("part", "learns", "trainable", "parameters", title="What this run teaches")
    for part in PARTS:
        if part in sizes:
            table.add_row(part, shown[modes[part]], f"{trainable.get(part, 0):,}", f"{sizes[part]:,}")
    table.add_row("codec", "no", "0", f"{sizes['codec']:,}")
    table.add_row("all", "", f"{sum(trainable.values()):,}", f"{sum(sizes.values()):,}")
    return table
