"""Which tensor belongs to which group, and what one precision means for each component."""

from __future__ import annotations

from typing import Any

import pytest

from edgeomni.errors import UsageError
from edgeomni.quantize.policy import component_precisions, groups_of, scheme_of
from edgeomni.quantize.schemes import Scheme

GROUPS = {
    "encoder": {"encoder.linear", "adapter.linear", "adapter.proj"},
    "llm": {"body.linear", "tts.linear", "text_head", "audio_head", "embedding"},
    "codec": {"codec"},
}


@pytest.mark.parametrize(
    ("precision", "encoder", "llm", "codec"),
    [
        ("fp32", "fp32", "fp32", "fp32"),
        ("fp16", "fp16", "fp16", "fp16"),
        ("int8", "int8", "int8", "fp32"),
        ("int4", "int8", "int4", "fp32"),
        ("q4_k_m", "q8_0", "q4_k_m", "f16"),
        ("bf16", "bf16", "bf16", "f16"),
        ("q8_0", "q8_0", "q8_0", "f16"),
        ("nf4", "nf4", "nf4", "fp32"),  # another format's; whether it is offered is for that format to say
    ],
)
def test_one_word_fills_three_components(precision: str, encoder: str, llm: str, codec: str) -> None:
    assert component_precisions(precision) == {"encoder": encoder, "llm": llm, "codec": codec}


def test_each_component_has_its_groups() -> None:
    assert {name: set(groups_of(name)) for name in GROUPS} == GROUPS
    with pytest.raises(UsageError, match="'decoder'; known are encoder, llm, codec"):
        groups_of("decoder")


NAMES = {
    "encoder.layers.11.self_attn.k_proj.weight": "encoder.linear",
    "encoder.layers.0.self_attn.out_proj.weight": "encoder.linear",
    "encoder.layers.0.fc1.weight": "encoder.linear",
    "encoder.layers.0.fc2.weight": "encoder.linear",
    "encoder.layers.0.fc2.bias": None,
    "encoder.layers.0.final_layer_norm.weight": None,
    "encoder.conv1.weight": None,
    "encoder.embed_positions.weight": None,
    "adapter.fc_1.weight": "adapter.linear",
    "adapter.fc_2.weight": "adapter.linear",
    "adapter.fc_1.bias": None,
    "adapter.proj.weight": "adapter.proj",
    "body.layers.23.self_attn.o_proj.weight": "body.linear",
    "body.layers.0.mlp.down_proj.weight": "body.linear",
    "body.layers.0.self_attn.q_proj.bias": None,
    "body.layers.0.self_attn.q_norm.weight": None,
    "body.norm.weight": None,
    "tts.layers.5.mlp.up_proj.weight": "tts.linear",
    "tts.norm.weight": None,
    "text_head.weight": "text_head",
    "audio_head.weight": "audio_head",
    "embedding.weight": "embedding",
    "codec.decoder.model.0.weight": "codec",
    "my.text_head.weight": None,
    "text_head.weight.more": None,
}


def test_every_name_leads_to_its_groups_scheme() -> None:
    schemes = {group: Scheme("int8", i + 1) for i, group in enumerate(sorted(set().union(*GROUPS.values())))}
    assert {name: scheme_of(name, schemes) for name in NAMES} == {
        name: None if group is None else schemes[group] for name, group in NAMES.items()
    }


def test_a_group_without_a_scheme_stays_fp32() -> None:
    assert scheme_of("codec.decoder.model.0.weight", {"text_head": Scheme("fp16")}) is None


def test_every_matrix_of_a_model_has_a_group_and_nothing_else_has(tiny_model: Any) -> None:
    schemes = dict.fromkeys(GROUPS["encoder"] | GROUPS["llm"], Scheme("fp16"))
    for name, parameter in tiny_model.named_parameters():
        if name.startswith("codec.") or name == "encoder.embed_positions.weight":
            assert scheme_of(name, schemes) is None, name
        else:
            assert (scheme_of(name, schemes) is not None) == (parameter.dim() == 2), name
