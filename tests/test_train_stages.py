"""What each stage may move: a table written from Mini-Omni's paper, and every tensor looked at after real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import SPECIALS, WORDS_IN_TABLE, samples_in, small_model

from edgeomni.errors import TrainError
from edgeomni.train import TrainConfig, fit
from edgeomni.train.config import LearnConfig, OptimizerConfig, PeftConfig, RunConfig, Stage
from edgeomni.train.stages import Frozen, may_move, modes_of, pieces

# arXiv 2408.16725, section 3.3: stage 1 trains the adapters with the language model frozen, stage 2 the language model
# with the adapters frozen, stage 3 everything but the encoder. Here the language model learns by LoRA.
ADAPTERS = {"adapter", "audio rows", "audio head", "tts"}
LLM = {"LoRA", "specials"}
MOVES: dict[str, set[str]] = {
    "1": ADAPTERS,
    "2": LLM,
    "3": ADAPTERS | LLM,
    "end-to-end": ADAPTERS | LLM,
    "ctc": {"encoder"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "TTS adapter": {"tts_layers": 1},
}
LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def group(name: str) -> str:
    """What the table above calls a tensor of the state dict; the joint tables are told apart by `blocks`."""
    if name.startswith("body.") and name.endswith(tuple(f"{layer}.weight" for layer in LORA)):
        return "LoRA"
    if name == "encoder.embed_positions.weight":
        return "positions"
    return {"audio_head": "audio head"}.get(name.split(".")[0], name.split(".")[0])


def blocks(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group -> its tensors, each cut out here by the sizes of tests/training.py."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(("embedding.", "text_head.")):
            text = WORDS_IN_TABLE + SPECIALS
            for part, rows in (
                ("words", tensor[:WORDS_IN_TABLE]),
                ("specials", tensor[WORDS_IN_TABLE:text]),
                ("audio rows", tensor[text:]),
            ):
                if len(rows):
                    found.setdefault(part, {})[name] = rows
        else:
            found.setdefault(group(name), {})[name] = tensor
    return found


def trained(model: Any, folder: Path, stage: Stage, **changes: Any) -> Any:
    samples = samples_in(folder, 6)
    optimizer = OptimizerConfig(steps=3, batch=5, lr=0.05, warmup=0, weight_decay=0.5)
    config = TrainConfig(stage=stage, optimizer=optimizer, run=RunConfig(log_every=3, save_every=3), **changes)
    return fit(model, samples, config).model


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Group -> whether all of its tensors have changed (True), or none has (False)."""
    assert before.keys() == after.keys()
    out = {}
    for name, tensors in blocks(before).items():
        now = blocks(after)[name]
        changed = {not torch.equal(tensor, now[key]) for key, tensor in tensors.items()}
        assert len(changed) == 1, f"{name}: some tensors have moved and some have not"
        out[name] = changed.pop()
    return out


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("stage", list(MOVES))
def test_what_must_move_moves_and_nothing_else_does(stage: Stage, shape: str, tmp_path: Path) -> None:
    model = small_model(**SHAPES[shape])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = trained(model, tmp_path, stage).state_dict()
    found = moved(before, after)
    assert {name for name, changed in found.items() if changed} == MOVES[stage] & found.keys()


def test_without_lora_the_whole_llm_learns_and_its_words_with_it(tmp_path: Path) -> None:
    model = small_model(tied=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = moved(before, trained(model, tmp_path, "2", lora=False).state_dict())
    assert {name for name, changed in found.items() if changed} == {"LoRA", "body", "words", "specials"}


def test_a_part_may_be_frozen_or_trained_by_choice(tmp_path: Path) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn = LearnConfig(encoder="train", adapter="freeze", audio="freeze", specials="freeze", words="train")
    found = moved(before, trained(model, tmp_path, "3", learn=learn).state_dict())
    assert {name for name, changed in found.items() if changed} == {"encoder", "words", "LoRA"}


def test_lora_may_be_kept_to_some_layers_and_go_to_the_encoder(tmp_path: Path) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn = LearnConfig(encoder="lora", adapter="freeze", audio="freeze", specials="freeze")
    after = trained(model, tmp_path, "3", learn=learn, peft=PeftConfig(targets=["q_proj", "fc1"])).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "body.layers.0.self_attn.q_proj.weight",
        "body.layers.1.self_attn.q_proj.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "encoder.layers.0.fc1.weight",
    }


def test_a_frozen_tensor_that_moved_by_one_bit_is_named() -> None:
    model = small_model()
    modes = modes_of(TrainConfig(stage="1"))
    frozen = Frozen(model, modes, [])
    frozen.check(model)
    with torch.no_grad():
        model.audio_rows().add_(1)
        model.adapter.proj.weight.add_(1)
    frozen.check(model)  # both may move in stage 1
    with torch.no_grad():
        row = model.embedding.weight[WORDS_IN_TABLE - 1]
        row[3] = torch.nextafter(row[3], torch.tensor(9.0))
    with pytest.raises(TrainError, match=r"embedding\.weight\[words\]; nothing was kept"):
        frozen.check(model)


def test_every_tensor_belongs_to_a_part_but_the_codecs() -> None:
    for shape in SHAPES.values():
        model = small_model(**shape)
        found = pieces(model)
        assert {name for name, (part, _) in found.items() if part is None} == {
            name for name in model.state_dict() if name.startswith("codec.")
        }
        assert sum(t.numel() for _, t in found.values()) == sum(t.numel() for t in model.state_dict().values())


def test_the_table_counts_what_learns(tmp_path: Path) -> None:
    shown: list[Any] = []
    model = small_model()
    config = TrainConfig(stage="3", optimizer=OptimizerConfig(steps=1, batch=2), peft=PeftConfig(rank=4))
    fit(model, samples_in(tmp_path), config, show=shown.append)
    cells = list(zip(*(column.cells for column in shown[0].columns), strict=True))
    rows = {str(row[0]): [str(cell) for cell in row[1:]] for row in cells}
    # LoRA of rank 4 on 2 layers: q, o 64 x 64; k, v 64 -> 32; gate, up 64 -> 96; down 96 -> 64.
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert rows["body"][:2] == ["by LoRA", f"{lora:,}"]
    assert rows["specials"][:2] == ["whole", f"{SPECIALS * 64:,}"]
    assert rows["encoder"][:2] == ["no", "0"] and rows["codec"][:2] == ["no", "0"]
    assert rows["audio"][1] == f"{7 * 40 * 64:,}"
    total = sum(t.numel() for t in model.state_dict().values())
    assert rows["all"][2] == f"{total:,}"


def test_everything_frozen_is_refused() -> None:
    config = TrainConfig(stage="ctc", learn=LearnConfig(encoder="freeze"))
    with pytest.raises(TrainError, match="every part is frozen"):
        modes_of(config)


def test_positions_of_the_encoder_never_move() -> None:
    modes = modes_of(TrainConfig(stage="ctc"))
    assert not may_move("encoder.embed_positions.weight", "encoder", modes, [])
    assert may_move("encoder.conv1.weight", "encoder", modes, [])


def test_targets_that_no_part_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"\['qkv'\] are no linear layers of body"):
        trained(small_model(), tmp_path, "3", peft=PeftConfig(targets=["qkv"]))
