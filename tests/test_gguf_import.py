"""An LLM in a GGUF file becomes a checkpoint's body: its answers against transformers' and llama.cpp's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_writing
import numpy as np
import parts
import pytest
import torch

from edgeomni.errors import CheckpointError
from edgeomni.model import checkpoints

IDS = [5, 17, 3, 88, 41, 0, 64, 23, 9, 70, 33, 2, 51, 19, 77, 6] * 4


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    parts.whisper(root / "whisper"), parts.snac(root / "snac")
    for kind in ("qwen2", "qwen2-untied", "qwen3", "llama"):
        parts.llm(root / kind, kind)
    return root


def composed(shelf: Path, llm: Path, **options: Any) -> Any:
    return checkpoints.compose(str(shelf / "whisper"), str(llm), str(shelf / "snac"), **options)


@pytest.mark.parametrize("kind", parts.LLMS)
def test_logits_are_those_of_the_model_that_was_written(shelf: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.gguf"
    theirs = gguf_writing.write(parts.llm(tmp_path / kind, kind), path)
    ours = composed(shelf, path)
    got = gguf_writing.text_logits(ours, IDS)[:, : parts.WORDS]
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(got - expected).max() < 1e-4
    assert ours.spec.tied == bool(theirs.config.tie_word_embeddings)
    assert ours.licences["llm"] == "mit (some.gguf)"
    again = checkpoints.load(checkpoints.save(ours, tmp_path / "saved"))
    assert np.array_equal(gguf_writing.text_logits(again, IDS), gguf_writing.text_logits(ours, IDS))


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied", "qwen2-linear-rope", "qwen3", "llama", "llama3-rope"])
def test_logits_are_those_of_llama_cpp_on_the_same_file(shelf: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.gguf"
    gguf_writing.write(parts.llm(tmp_path / kind, kind), path)
    got = gguf_writing.text_logits(composed(shelf, path), IDS)[:, : parts.WORDS]
    expected = gguf_writing.llama_cpp_logits(path, IDS)
    assert np.abs(got - expected).max() < 2e-3 * expected.std()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantized_tensors_are_dequantized_exactly(shelf: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.gguf"
    gguf_writing.write(shelf / "qwen2", path, kind)
    reader = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    model = composed(shelf, path)
    for name, parameter in model.body.named_parameters():
        there = reader[gguf_writing.gguf_name(f"model.{name}")]
        assert np.array_equal(parameter.detach().numpy(), there.reshape(parameter.shape)), name
    assert np.array_equal(model.embedding.weight[: parts.WORDS].detach().numpy(), reader["token_embd.weight"])


def test_a_head_that_repeats_the_embedding_is_tied(shelf: Path, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]

    gguf_writing.write(shelf / "qwen2", tmp_path / "a.gguf", "Q8_0", tensors=repeat)
    gguf_writing.write(shelf / "qwen2-untied", tmp_path / "b.gguf", "Q8_0")
    assert composed(shelf, tmp_path / "a.gguf").spec.tied
    assert not composed(shelf, tmp_path / "b.gguf").spec.tied


def test_another_name_than_gguf_is_told_by_how_the_file_begins(shelf: Path, tmp_path: Path) -> None:
    gguf_writing.write(shelf / "qwen2", tmp_path / "blob")
    assert composed(shelf, tmp_path / "blob").spec.body.kind == "qwen2"


def test_a_sliding_window_bounds_the_context(shelf: Path, tmp_path: Path) -> None:
    gguf_writing.write(shelf / "qwen2", tmp_path / "a.gguf", qwen2__attention__sliding_window=48)
    assert composed(shelf, tmp_path / "a.gguf").spec.context == 48


def test_it_is_swapped_into_a_checkpoint(shelf: Path, tmp_path: Path) -> None:
    from edgeomni.model.swap import swap

    gguf_writing.write(shelf / "llama", tmp_path / "other.gguf", "Q8_0")
    old = composed(shelf, shelf / "qwen2")
    new = swap(old, llm=str(tmp_path / "other.gguf")).model
    assert new.spec.body.kind == "llama" and "other.gguf" in new.provenance["source"]
    same = composed(shelf, tmp_path / "other.gguf")
    assert np.array_equal(gguf_writing.text_logits(new, IDS)[:, :90], gguf_writing.text_logits(same, IDS)[:, :90])


def dropped(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, shape: tuple[int, ...], value: float = 1.0) -> Any:
    return lambda tensors: tensors.update({name: np.full(shape, value, np.float32)})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"arch": "gemma3"}, "architecture 'gemma3'; supported are qwen2, qwen3, llama"),
    "no layers": ({"qwen2__block_count": None}, "lacks qwen2.block_count"),
    "no heads": ({"qwen2__attention__head_count": 0}, "says 0 for qwen2.attention.head_count"),
    "text for a number": ({"qwen2__block_count": "two"}, "qwen2.block_count is 'two'"),
    "more layers than tensors": ({"qwen2__block_count": 10**9}, "block_count is 1000000000"),
    "fewer layers": ({"qwen2__block_count": 1}, "unexpected: blk.1.attn_k.bias"),
    "another width": ({"qwen2__embedding_length": 32}, "wrong shape: embed_tokens.weight"),
    "experts": ({"qwen2__expert_count": 8}, "a mixture of experts"),
    "values of another size": ({"qwen2__attention__value_length": 8}, "values of 8"),
    "partial rotary": ({"qwen2__rope__dimension_count": 8}, "8 of them rotated"),
    "long rotary": ({"qwen2__rope__scaling__type": "longrope"}, "rotary scaling 'longrope'"),
    "an adapter": ({"general__type": "adapter"}, "type 'adapter', not a model"),
    "one of several files": ({"split__count": 3}, "--merge"),
    "our own body": ({"edgeomni__role": "body"}, "init --from CHECKPOINT"),
    "a missing tensor": ({"tensors": dropped("blk.1.ffn_up.weight")}, "missing: layers.1.mlp.up_proj.weight"),
    "no embedding": ({"tensors": dropped("token_embd.weight")}, "holds no token_embd.weight"),
    "an empty embedding": ({"tensors": with_tensor("token_embd.weight", (90, 64), 0.0)}, "all zeros"),
    "one tensor more": ({"tensors": with_tensor("blk.0.extra.weight", (4,))}, "unexpected: blk.0.extra.weight"),
    "infinite numbers": ({"tensors": with_tensor("output_norm.weight", (64,), float("inf"))}, "NaN or infinite"),
    "strange rotary factors": (
        {"tensors": lambda t: t.update({"rope_freqs.weight": np.array([1, 3, 2, 9, 1, 4, 7, 2], np.float32)})},
        "rotary factors are not those of Llama 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(shelf: Path, tmp_path: Path, case: str) -> None:
    changed, told = REFUSED[case]
    gguf_writing.write(shelf / "qwen2", tmp_path / "some.gguf", **changed)
    with pytest.raises(CheckpointError) as caught:
        composed(shelf, tmp_path / "some.gguf")
    assert told in str(caught.value)


def test_damaged_files_are_refused_or_read(shelf: Path, tmp_path: Path) -> None:
    from edgeomni.model import parts as product

    gguf_writing.write(shelf / "qwen2", tmp_path / "whole.gguf", "Q8_0", some__scores=[0.5] * 40)
    whole = (tmp_path / "whole.gguf").read_bytes()
    broken, rng = tmp_path / "broken.gguf", np.random.default_rng(0)
    header = whole.index(b"output_norm.weight") + 60
    refused = 0
    for n in range(240):
        damaged = bytearray(whole)
        if n % 3 == 0:
            damaged = damaged[: int(rng.integers(len(whole)))]
        else:
            place = int(rng.integers(header))
            damaged[place] ^= 1 << int(rng.integers(8))
        broken.write_bytes(damaged)
        try:
            product.read_llm(str(broken), product.check_llm(str(broken)))
        except CheckpointError:
            refused += 1
    assert refused > 120  # all of the truncated ones, and most of the others


def test_the_command_says_what_it_wrote(shelf: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgeomni.cli.init import init_

    gguf_writing.write(shelf / "qwen3", tmp_path / "some.gguf", "F16")
    given = ["--encoder", str(shelf / "whisper"), "--llm", str(tmp_path / "some.gguf"), "--codec", str(shelf / "snac")]
    result = CliRunner().invoke(init_, [*given, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = checkpoints.load(tmp_path / "out")
    assert model.spec.body.kind == "qwen3" and "llm some.gguf" in model.provenance["source"]
