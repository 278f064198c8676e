"""Swapping parts of a checkpoint: what has to be kept is kept bit for bit, and the rest is new as it has to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import swaps
import torch
from swaps import assert_statistics, changed, snapshot, swapped, trained
from transformers import AutoModelForCausalLM, WhisperModel

from edgeomni.chat import ChatSpec
from edgeomni.model import checkpoints

WORDS, WIDE_WORDS = 90, 70


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swaps.shelf(tmp_path_factory.mktemp("swaps"))


def words_of(directory: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory).get_input_embeddings().weight.detach()


def speaks(model: Any, tmp_path: Path) -> None:
    """It computes, and does the same after it was saved and loaded."""
    layout = model.spec.layout
    ids = torch.stack([torch.full((5,), layout.shift(k) + 1) for k in range(layout.streams)] + [torch.arange(5)])[None]
    mel = torch.randn(1, model.spec.front_end.n_mels, 8, generator=torch.Generator().manual_seed(0))
    again = checkpoints.load(checkpoints.save(model, tmp_path / "saved"))
    with torch.inference_mode():
        text, audio = model(ids, [(1, model.encode(mel)[0, :3])])
        assert text.shape == (1, 5, layout.text_vocab) and audio.shape == (1, 5, layout.streams, layout.audio_vocab)
        assert text.isfinite().all() and audio.isfinite().all()
        same = again(ids, [(1, again.encode(mel)[0, :3])])
        assert torch.equal(text, same[0]) and torch.equal(audio, same[1])
    assert again.spec == model.spec and again.tokenizer_json == model.tokenizer_json


# --- the encoder


def test_an_encoder_of_the_same_width_changes_itself_alone(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    before = snapshot(old)
    done = swapped(shelf, old, encoder="whisper-2")
    assert changed(before, done.model) == {"encoder"}
    theirs = WhisperModel.from_pretrained(shelf / "whisper-2").encoder.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in done.model.encoder.state_dict().items())
    assert list(done.notes.stages) == [1] and "features of another encoder" in done.notes.stages[1][0]
    assert done.notes.parts["adapter"] == "kept" and done.notes.untrained == ["adapter"]
    speaks(done.model, tmp_path)


def test_an_encoder_of_another_width_gets_a_new_adapter(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    before = snapshot(old)
    done = swapped(shelf, old, encoder="whisper-narrow")
    assert changed(before, done.model) == {"encoder", "adapter"}
    spec = done.model.spec
    assert (spec.encoder.width, spec.front_end.n_mels, spec.front_end.window_s) == (24, 32, 2)
    assert done.model.adapter.fc_1.weight.shape == (96, 24), "as many hidden as before"
    assert done.notes.parts["adapter"] == "new: it maps 24 -> 64 now, and mapped 32 -> 64"
    assert list(done.notes.stages) == [1, 3] and done.notes.stages[1] == ["the adapter is new"]
    speaks(done.model, tmp_path)


def test_another_kind_of_adapter_may_come_with_the_encoder(shelf: Path) -> None:
    done = swapped(shelf, trained(shelf), encoder="whisper-2", adapter="linear")
    assert done.model.spec.adapter.kind == "linear" and done.model.adapter.proj.bias is not None
    assert done.notes.parts["adapter"] == "new, linear in place of swiglu"


# --- the codec


def test_a_codec_of_the_same_layout_changes_itself_alone(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    before = snapshot(old)
    done = swapped(shelf, old, codec="snac-2")
    assert changed(before, done.model) == {"codec"}
    theirs = torch.load(shelf / "snac-2" / "pytorch_model.bin")
    assert all(torch.equal(t, theirs[n]) for n, t in done.model.codec.state_dict().items())
    assert list(done.notes.stages) == [1, 3] and "stand for other sounds" in done.notes.stages[1][0]
    assert done.notes.untrained == ["audio rows"]
    speaks(done.model, tmp_path)


def test_a_codec_of_another_layout_gets_audio_rows_like_the_old(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    before, words = snapshot(old), WORDS + 64
    done = swapped(shelf, old, codec="mimi")
    assert changed(before, done.model) == {"codec", "embedding"}
    layout, rows = done.model.spec.layout, done.model.embedding.weight.detach()
    assert (layout.streams, layout.codebook_size, layout.audio_vocab, layout.text_vocab) == (5, 32, 96, words)
    earlier = before["embedding.weight"]
    assert torch.equal(rows[:words], earlier[:words])
    new, old_audio = rows[words:].view(5, 96, 64), earlier[words:].view(3, 114, 64)
    assert torch.equal(new[:3, 32:], old_audio[:, 50:]), "end of audio and the other specials"
    fresh = torch.cat([new[:3, :32].flatten(0, 1), new[3:].flatten(0, 1)])
    assert_statistics(fresh, earlier[words:])
    assert done.notes.parts["audio rows"].startswith("new, 5 streams of 32 codes, at the statistics of the old ones")
    assert done.notes.stages[1] == ["the audio rows are new"]
    speaks(done.model, tmp_path)


def test_a_head_of_its_own_gets_rows_like_its_own(shelf: Path) -> None:
    old = trained(shelf, llm="llama")
    before = snapshot(old)
    done = swapped(shelf, old, codec="mimi")
    assert changed(before, done.model) == {"codec", "embedding", "audio_head"}
    model: Any = done.model
    rows = model.audio_head.weight.detach().view(5, 96, 64)
    assert_statistics(rows[3:].flatten(0, 1), before["audio_head.weight"])
    assert torch.equal(rows[:3, 32:], before["audio_head.weight"].view(3, 114, 64)[:, 50:])


def test_a_mimi_in_place_of_a_mimi_speaks_as_many_streams(shelf: Path) -> None:
    old = trained(shelf, codec="mimi", streams=2)
    before = snapshot(old)
    assert changed(before, swapped(shelf, old, codec="mimi").model) == set()
    assert (
        swapped(shelf, trained(shelf, codec="mimi", streams=2), codec="mimi", streams=4).model.spec.codec.streams == 4
    )


# --- the LLM


def test_an_llm_of_the_same_width_keeps_special_tokens_and_audio_rows(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    before = snapshot(old)
    done = swapped(shelf, old, llm="llama")
    model: Any = done.model
    assert changed(before, model) == {"body", "embedding", "text_head", "audio_head"}
    theirs = AutoModelForCausalLM.from_pretrained(shelf / "llama")
    rows, earlier, words = model.embedding.weight, before["embedding.weight"], WORDS + 64
    assert torch.equal(rows[:WORDS], theirs.get_input_embeddings().weight)
    assert torch.equal(rows[WORDS:], earlier[WORDS:])
    assert torch.equal(model.text_head.weight[:WORDS], theirs.lm_head.weight)
    assert torch.equal(model.text_head.weight[WORDS:], earlier[WORDS:words]), "the heads were tied"
    assert torch.equal(model.audio_head.weight, earlier[words:])
    inner = theirs.model.state_dict()
    assert all(torch.equal(t, inner[n]) for n, t in model.body.state_dict().items())
    assert not model.spec.tied and model.spec.context == 128
    assert list(done.notes.stages) == [1, 2, 3]
    assert done.notes.stages[1][0] == "the adapter was trained with another LLM"
    assert done.notes.untrained == ["adapter", "special tokens", "audio rows"]
    speaks(model, tmp_path)


def test_an_llm_of_another_width_gets_everything_else_new(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    old.spec = dataclasses.replace(old.spec, chat=ChatSpec(stop_words=("the",)))
    before, encoder = snapshot(old), swaps.starting_with(old, ["encoder", "codec"])
    done = swapped(shelf, old, llm="wide")
    words = words_of(shelf / "wide")
    model: Any = done.model
    assert changed(before, model) == {"body", "embedding", "adapter"}
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in encoder.items())
    assert torch.equal(model.embedding.weight[:WIDE_WORDS], words)
    assert_statistics(model.embedding.weight[WIDE_WORDS : WIDE_WORDS + 64].detach(), words)
    assert_statistics(model.embedding.weight[WIDE_WORDS + 64 :].detach(), words)
    assert model.tokenizer_json == (shelf / "wide" / "tokenizer.json").read_text()
    assert model.spec.layout.eot == WIDE_WORDS and model.spec.chat == ChatSpec()
    assert "chat template" in done.notes.parts and done.notes.parts["special tokens"].startswith("new")
    assert done.notes.stages[1] == ["the adapter is new", "the audio rows are new"]
    speaks(model, tmp_path)


def test_a_tts_adapter_is_kept_where_its_blocks_fit(shelf: Path, tmp_path: Path) -> None:
    kept = trained(shelf, tts_layers=1)
    before = snapshot(kept)
    done = swapped(shelf, kept, llm="llm-2")
    assert changed(before, done.model) == {"body", "embedding"} and done.notes.parts["TTS adapter"] == "kept"
    assert "TTS adapter" in done.notes.untrained
    speaks(done.model, tmp_path)
    for how, fate in (
        ({"llm": "llama"}, "new, 1 layer(s)"),
        ({"llm": "llm-2", "tts_layers": 2}, "new, 2 layer(s)"),
        ({"llm": "llm-2", "tts_layers": 0}, "left out"),
    ):
        other = swapped(shelf, trained(shelf, tts_layers=1), **how)
        assert other.notes.parts["TTS adapter"] == fate
        assert (other.model.tts is None) == (fate == "left out") == ("TTS adapter" not in other.notes.untrained)
        if other.model.tts is not None:
            drawn = other.model.state_dict()["tts.layers.0.mlp.up_proj.weight"]
            assert not torch.equal(drawn, before["tts.layers.0.mlp.up_proj.weight"])


# --- several at once


def test_all_parts_at_once(shelf: Path, tmp_path: Path) -> None:
    done = swapped(
        shelf, trained(shelf), encoder="whisper-narrow", llm="wide", codec="mimi", streams=3, adapter="linear"
    )
    spec = done.model.spec
    assert (spec.encoder.width, spec.body.width, spec.codec.kind, spec.layout.streams) == (24, 96, "mimi", 3)
    assert done.notes.stages[1] == ["the adapter is new", "the audio rows are new"], "each reason once"
    assert list(done.notes.stages) == [1, 2, 3]
    speaks(done.model, tmp_path)


def test_what_is_new_follows_the_seed(shelf: Path) -> None:
    one, same, other = (
        swapped(shelf, trained(shelf), encoder="whisper-narrow", codec="mimi", seed=seed).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(one["adapter.proj.weight"], other["adapter.proj.weight"])
