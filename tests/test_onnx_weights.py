"""The one reader of weights: packing, biases that are partly missing, rows of heads and of the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx_llm import exported, make, random_ids, torch_logits, walk

from edgeomni.exporters.onnx.weights import PARTS, PackedWeights, embedding_rows, head_rows, packed_parts
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.schemes import Scheme, quantize

ATTENTION = "body.layers.0.self_attn"


def tensors(*biased: str) -> dict[str, torch.Tensor]:
    rows = {"q": 4, "k": 2, "v": 2}
    out = {f"{ATTENTION}.{p}_proj.weight": torch.full((n, 8), float(n)) for p, n in rows.items()}
    return out | {f"{ATTENTION}.{p}_proj.bias": torch.full((rows[p],), float(ord(p))) for p in biased}


@pytest.mark.parametrize(
    ("biased", "expected"),
    [
        ("", None),
        ("qkv", [113] * 4 + [107] * 2 + [118] * 2),
        ("qv", [113] * 4 + [0] * 2 + [118] * 2),
        ("k", [0] * 4 + [107] * 2 + [0] * 2),
    ],
)
def test_missing_biases_are_zeros_unless_all_are_missing(biased: str, expected: list[float] | None) -> None:
    weights = PackedWeights(tensors(*biased), {"body.linear": Scheme("fp32")})
    packed, bias = weights.linear(f"{ATTENTION}.qkv")
    np.testing.assert_array_equal(packed.data[:, 0], [4] * 4 + [2] * 4)
    if expected is None:
        assert bias is None
    else:
        assert bias is not None and bias.dtype == np.float32
        np.testing.assert_array_equal(bias, expected)


def test_the_groups_scheme_is_used_and_none_means_fp32() -> None:
    given = {f"{ATTENTION}.o_proj.weight": torch.randn(4, 32), "adapter.proj.weight": torch.randn(4, 32)}
    weights = PackedWeights(given, {"body.linear": Scheme("int4", 16)})
    assert weights.linear(f"{ATTENTION}.o_proj")[0].scheme == Scheme("int4", 16)
    assert weights.linear("adapter.proj")[0].scheme == Scheme("fp32")
    assert "adapter.proj.weight" in weights and "adapter.proj.bias" not in weights


def test_what_is_packed() -> None:
    assert packed_parts("tts.layers.3.mlp.gate_up") == ("tts.layers.3.mlp.gate_proj", "tts.layers.3.mlp.up_proj")
    assert packed_parts("adapter.fc") == ("adapter.fc_1", "adapter.fc_2")
    assert packed_parts("encoder.layers.0.fc1") == ("encoder.layers.0.fc1",)


def test_half_precision_tensors_are_read_as_float32_arrays_in_one_piece() -> None:
    weights = PackedWeights({"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T}, {})
    assert weights.array("a").dtype == np.float32 and weights.array("a").flags.c_contiguous
    np.testing.assert_array_equal(weights.array("a"), [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen2 untied with TTS adapter"])
def test_rows_of_heads_and_embedding(name: str, tiny_model: OmniModel) -> None:
    model, _ = make(name, tiny_model)
    embedding, split = model.embedding.weight.detach().numpy(), model.spec.layout.text_vocab
    rows = {"text": embedding[:split], "audio": embedding[split:]}
    for part in PARTS:
        np.testing.assert_array_equal(embedding_rows(model, part), rows[part])
        head: Any = getattr(model, f"{part}_head")
        np.testing.assert_array_equal(
            head_rows(model, part), rows[part] if head is None else head.weight.detach().numpy()
        )


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_a_body_with_some_biases_is_exported(flavour: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    model, _ = make("qwen2 tied", tiny_model)
    model.body.layers[0].self_attn.k_proj.bias = None
    llm, _ = exported(model, tmp_path, "fp32", flavour)
    ids = random_ids(model, 12)
    text, audio = torch_logits(model, ids)
    ((at, ours_text, ours_audio),) = walk(llm, ids, None, [12])
    np.testing.assert_allclose(ours_text, text[at], atol=1e-4)
    np.testing.assert_allclose(ours_audio, audio[at], atol=1e-4)


def test_packing_does_not_mix_rows() -> None:
    """Quantizing the packed rows is quantizing each layer's own."""
    given = {f"{ATTENTION}.{p}_proj.weight": torch.randn(n, 32) for p, n in (("q", 4), ("k", 2), ("v", 2))}
    scheme = Scheme("int4", 16)
    packed, _ = PackedWeights(given, {"body.linear": scheme}).linear(f"{ATTENTION}.qkv")
    alone = [quantize(t.numpy(), scheme).data for t in given.values()]
    np.testing.assert_array_equal(packed.data, np.concatenate(alone))
