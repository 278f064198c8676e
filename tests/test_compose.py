"""Composition from parts: each keeps its weights, told against transformers' and SNAC's own forward."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import parts
import pytest
import torch
from transformers import AutoModelForCausalLM, MimiModel, WhisperModel

from edgeomni.errors import CheckpointError
from edgeomni.model import checkpoints, codecs


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    parts.whisper(root / "whisper"), parts.snac(root / "snac"), parts.mimi(root / "mimi"), parts.llm(root / "llm")
    return root


def composed(shelf: Path, llm: Path | None = None, codec: str = "snac", **options: Any) -> Any:
    return checkpoints.compose(str(shelf / "whisper"), str(llm or shelf / "llm"), str(shelf / codec), **options)


@pytest.mark.parametrize("kind", parts.LLMS)
def test_text_logits_are_those_of_the_language_model(shelf: Path, tmp_path: Path, kind: str) -> None:
    directory = parts.llm(tmp_path / kind, kind)
    ours, theirs = composed(shelf, directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    embeds = torch.randn(2, 70, ours.spec.body.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(inputs_embeds=embeds).logits
        cache = ours.new_cache(2, 70)
        pieces = [ours.hidden(embeds[:, a:b], cache)[0] for a, b in ((0, 40), (40, 69), (69, 70))]
        got = ours.text_logits(torch.cat(pieces, 1))
    assert (got[..., : parts.WORDS] - expected).abs().max() < 1e-4
    assert ours.spec.tied == theirs.config.tie_word_embeddings
    again = checkpoints.load(checkpoints.save(ours, tmp_path / "saved"))
    with torch.inference_mode():
        assert torch.equal(again.text_logits(again.hidden(embeds)[0]), ours.text_logits(ours.hidden(embeds)[0]))


def test_encoder_is_whispers(shelf: Path) -> None:
    ours, theirs = composed(shelf), WhisperModel.from_pretrained(shelf / "whisper").eval()
    mel = torch.randn(1, 40, 300, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(ours.encode(mel), ours.adapter(theirs.encoder(mel).last_hidden_state), atol=1e-5)
    assert ours.spec.front_end.window_s == 3


def test_mimi_speaks_through_its_first_codebooks(shelf: Path, tmp_path: Path) -> None:
    ours, theirs = composed(shelf, codec="mimi", streams=3), MimiModel.from_pretrained(shelf / "mimi").eval()
    assert ours.spec.layout.streams == 3 and ours.spec.codec.kind == "mimi"
    codes = torch.randint(32, (1, 3, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.decode(codes).audio_values[0, 0]
    assert len(expected) == 9 * ours.spec.codec.frame_samples
    again = checkpoints.load(checkpoints.save(ours, tmp_path / "saved"))
    for model in (ours, again):
        assert torch.equal(model.decode_codes(list(codes.unbind(1))), expected)


def test_new_rows_look_like_the_old_ones(shelf: Path) -> None:
    model = composed(shelf, seed=4)
    layout, rows = model.spec.layout, model.embedding.weight
    words = AutoModelForCausalLM.from_pretrained(shelf / "llm").get_input_embeddings().weight
    assert layout.text_vocab == parts.WORDS + 64 and layout.eot == parts.WORDS
    assert torch.equal(rows[: parts.WORDS], words)
    assert (rows[parts.WORDS :].std(0) / words.std(0) - 1).abs().max() < 0.3
    assert not torch.equal(rows, composed(shelf, seed=5).embedding.weight)
    assert torch.equal(rows, composed(shelf, seed=4).embedding.weight)


def test_tts_adapter_gets_blocks_and_a_head_of_its_own(shelf: Path) -> None:
    model = composed(shelf, tts_layers=2, adapter="linear")
    assert len(model.tts.layers) == 2 and model.spec.tied and model.text_head is None
    assert model.audio_head.weight.shape == (3 * 114, 64)


def test_provenance_and_licences(shelf: Path) -> None:
    (shelf / "whisper" / "README.md").write_text("---\nlicense: mit\n---\n")
    model = composed(shelf)
    assert model.provenance["weights"] == "random" and str(shelf) not in str(model.provenance)
    assert model.licences["encoder"] == "mit (whisper)" and "not stated" in model.licences["llm"]


def test_a_directory_of_parts_is_a_checkpoint(shelf: Path, tmp_path: Path) -> None:
    for part, name in (("encoder", "whisper"), ("llm", "llm"), ("codec", "snac")):
        shutil.copytree(shelf / name, tmp_path / "all" / part)
    assert checkpoints.kind_of(tmp_path / "all") == "parts"
    again = checkpoints.load(tmp_path / "all").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in composed(shelf).state_dict().items())


def test_an_openai_checkpoint_may_be_the_encoder(shelf: Path, golden: Any, golden_model: Any) -> None:
    model = checkpoints.compose(str(golden.path / "small.pt"), str(shelf / "llm"), str(shelf / "snac"))
    expected = golden_model.encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.encoder.state_dict().items())


@pytest.mark.parametrize("part", ["whisper", "llm", "snac", "mimi"])
def test_missing_and_damaged_parts_are_named(shelf: Path, tmp_path: Path, part: str) -> None:
    damaged = Path(shutil.copytree(shelf, tmp_path / "shelf"))
    for file in damaged.glob(f"{part}/*model*"):
        file.write_bytes(file.read_bytes()[:200])
    codec = "mimi" if part == "mimi" else "snac"
    with pytest.raises(CheckpointError, match=f"/{part}"):
        composed(damaged, codec=codec)
    shutil.rmtree(damaged / part)
    with pytest.raises(CheckpointError, match=f"/{part}"):
        composed(damaged, codec=codec)


def test_parts_of_the_wrong_kind(shelf: Path) -> None:
    with pytest.raises(CheckpointError, match="whisper"):
        composed(shelf, shelf / "whisper")
    with pytest.raises(CheckpointError, match="codec type 'whisper'; supported are snac, mimi"):
        composed(shelf, codec="whisper")
    with pytest.raises(CheckpointError, match="9 streams"):
        composed(shelf, codec="mimi", streams=9)


def test_snac_with_attention_is_padded_to_whole_windows(tmp_path: Path) -> None:
    config = {
        "kind": "snac",
        "decoder_rates": [3, 2],
        "encoder_rates": [2, 3],
        "encoder_dim": 4,
        "decoder_dim": 64,
        "attn_window_size": 8,
        "codebook_size": 50,
        "vq_strides": [2, 1],
        "sampling_rate": 8000,
    }
    codec = codecs.build(config)
    codes = [torch.randint(50, (1, 5)), torch.randint(50, (1, 10))]
    padded = [torch.nn.functional.pad(codes[0], (0, 3)), torch.nn.functional.pad(codes[1], (0, 6))]
    with torch.inference_mode():
        expected = codec.decode(padded)[0, 0, :60]
    assert torch.equal(codecs.decode(codec, codes), expected)
