"""Which tensor gets which scheme."""

from __future__ import annotations

from typing import Any

import pytest

from edgeomni.errors import UsageError
from edgeomni.quantize.policy import BLOCKS, PRECISIONS, component_precisions, scheme_of, schemes_for
from edgeomni.quantize.schemes import Scheme


@pytest.mark.parametrize(
    ("precision", "encoder", "llm", "codec"),
    [
        ("fp32", "fp32", "fp32", "fp32"),
        ("fp16", "fp16", "fp16", "fp16"),
        ("int8", "int8", "int8", "fp32"),
        ("int4", "int8", "int4", "fp32"),
    ],
)
def test_one_word_fills_three_components(precision: str, encoder: str, llm: str, codec: str) -> None:
    assert component_precisions(precision) == {"encoder": encoder, "llm": llm, "codec": codec}


def test_int4_keeps_eight_bits_where_four_do_harm() -> None:
    schemes = schemes_for("llm", "int4")
    assert schemes["body.linear"].kind == schemes["tts.linear"].kind == "int4"
    assert schemes["text_head"] == schemes["audio_head"] == schemes["embedding"]
    assert schemes["text_head"].kind == "int8"


def test_block_replaces_the_bodys_default_only() -> None:
    chosen, default = schemes_for("llm", "int8", 16), schemes_for("llm", "int8")
    assert chosen["body.linear"] == Scheme("int8", 16)
    assert chosen["text_head"] == default["text_head"]


@pytest.mark.parametrize("block", [0, 24, 512, -32])
def test_a_block_that_no_kernel_takes_is_refused(block: int) -> None:
    with pytest.raises(UsageError, match=str(block)):
        schemes_for("llm", "int4", block)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("block", BLOCKS)
def test_float_plans_ignore_the_block(precision: str, block: int) -> None:
    blocked = {scheme.blocked for scheme in schemes_for("llm", precision, block).values()}
    assert blocked == {precision.startswith("int")}


@pytest.mark.parametrize(
    ("component", "precision", "word"),
    [
        ("codec", "int8", "codec:int8"),
        ("codec", "int4", "codec:int4"),
        ("encoder", "int4", "encoder int8"),
        ("llm", "int3", "int3"),
        ("decoder", "int8", "decoder"),
    ],
)
def test_what_is_not_offered_is_refused_with_a_way_out(component: str, precision: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        schemes_for(component, precision)


def test_unknown_preset_precision_lists_the_known() -> None:
    with pytest.raises(UsageError, match="fp32, fp16, int8, int4"):
        component_precisions("bf16")


def test_every_matrix_of_a_model_has_a_scheme_and_nothing_else_has(tiny_model: Any) -> None:
    schemes = {**schemes_for("encoder", "int8"), **schemes_for("llm", "int4")}
    for name, parameter in tiny_model.named_parameters():
        if name.startswith("codec.") or name == "encoder.embed_positions.weight":
            assert scheme_of(name, schemes) is None, name
        else:
            assert (scheme_of(name, schemes) is not None) == (parameter.dim() == 2), name


def test_codec_tensors_follow_the_codecs_plan() -> None:
    name = "codec.decoder.model.0.weight"
    assert scheme_of(name, schemes_for("codec", "fp16")) == Scheme("fp16")
    assert scheme_of(name, schemes_for("llm", "int4")) is None


def test_head_names_have_their_groups() -> None:
    schemes = schemes_for("llm", "int4")
    assert scheme_of("text_head.weight", schemes) == schemes["text_head"]
    assert scheme_of("audio_head.weight", schemes) == schemes["audio_head"]
    assert scheme_of("tts.layers.0.mlp.up_proj.weight", schemes) == schemes["tts.linear"]
    assert scheme_of("body.layers.11.self_attn.q_norm.weight", schemes) is None
