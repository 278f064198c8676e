"""A small checkpoint that passes for trained, and other parts to swap into it: what the tests of swapping share."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import parts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, WhisperConfig, WhisperModel

from edgeomni.model import checkpoints
from edgeomni.model.presets import word_tokenizer
from edgeomni.model.swap import Swapped, swap

WIDE = {"hidden_size": 96, "num_attention_heads": 6, "vocab_size": 70, "tie_word_embeddings": True}
NOT_TIED = "llama"


def shelf(root: Path) -> Path:
    """Parts: those that the checkpoint is composed of, others of the same sizes, and others of other sizes."""
    parts.whisper(root / "whisper"), parts.snac(root / "snac"), parts.mimi(root / "mimi"), parts.llm(root / "llm")
    for name in ("whisper", "llm"):
        changed = Path(shutil.copytree(root / name, root / f"{name}-2")) / "model.safetensors"
        save_file({n: t * 1.5 for n, t in load_file(changed).items()}, changed, metadata={"format": "pt"})
    changed = Path(shutil.copytree(root / "snac", root / "snac-2")) / "pytorch_model.bin"
    torch.save({n: t * 1.5 for n, t in torch.load(changed).items()}, changed)
    parts.llm(root / "llama", NOT_TIED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parts.LLMS, "wide", (Qwen2Config, WIDE))
        parts.llm(root / "wide", "wide")
    (root / "wide" / "tokenizer.json").write_text(word_tokenizer(70))
    _narrow_whisper(root / "whisper-narrow")
    return root


def _narrow_whisper(directory: Path) -> None:
    torch.manual_seed(9)
    sizes = {"d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    other = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 60}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = WhisperConfig(**sizes, **other, **ids, num_mel_bins=32, max_source_positions=100)
    WhisperModel(config).save_pretrained(directory)


def trained(root: Path, **options: Any) -> Any:
    """A composition whose new parts have moved: the audio rows lie elsewhere than the words, the norms are not 1."""
    llm = str(root / options.pop("llm", "llm"))
    codec = str(root / options.pop("codec", "snac"))
    model = checkpoints.compose(str(root / "whisper"), llm, codec, **options)
    words = model.spec.layout.text_vocab
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.startswith(("encoder", "codec")):
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        model.embedding.weight[words:] = model.embedding.weight[words:] * 3 + 0.7
        if model.audio_head is not None:
            model.audio_head.weight.mul_(0.5).sub_(0.4)
    model.provenance = {"weights": "trained", "source": "ours", "source_hash": "abc"}
    return model


def swapped(shelf: Path, old: Any, **how: Any) -> Swapped:
    """`swap` with parts named by their folder on the shelf."""
    places: dict[str, Any] = {k: str(shelf / v) if k in ("encoder", "llm", "codec") else v for k, v in how.items()}
    return swap(old, **places)


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: Any) -> set[str]:
    """First words of the names of all tensors that are not, bit for bit, what they were."""
    after = model.state_dict()
    same = {n for n in before.keys() & after.keys() if torch.equal(before[n], after[n])}
    return {name.partition(".")[0] for name in (before.keys() | after.keys()) - same}


def assert_statistics(rows: Tensor, like: Tensor) -> None:
    """Mean and standard deviation per dimension agree within 5 times what chance makes of as many rows."""
    count, mean, spread = len(rows), like.mean(0), like.std(0)
    assert ((rows.mean(0) - mean).abs() < 5 * spread / count**0.5).all()
    assert ((rows.std(0) / spread - 1).abs() < 5 / (2 * count) ** 0.5).all()
    assert not any(torch.equal(a, b) for a in rows[:3] for b in like), "drawn, not copied"


def starting_with(model: Any, parts: Iterable[str]) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.partition(".")[0] in set(parts)}
