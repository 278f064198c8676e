"""The layer program of a codec: what its streaming costs in latency, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from codec_models import LAYOUTS, mimi, offline, random_codes, snac, snac_spec
from torch import nn

from edgeomni.errors import CheckpointError
from edgeomni.model.codec_plan import Conv, Lookup
from edgeomni.model.codec_reader import halved, read_plan


@pytest.mark.parametrize("layout, frames", [("snac24", 3), ("snac32", 8), ("snac44", 8), ("snac_dense", 12)])
def test_first_push(layout: str, frames: int) -> None:
    """24 kHz: 2.32 frames of right context; with attention windows of 4 codec frames: two windows."""
    codec = snac(layout)
    decoder = read_plan(codec, snac_spec(codec))
    assert decoder.first_push == frames
    assert decoder.push_multiple == (4 if LAYOUTS[layout]["attn_window_size"] else 1)


def test_mimi_waits_for_nothing() -> None:
    decoder = read_plan(*mimi())
    assert (decoder.first_push, decoder.push_multiple, decoder.lag_samples) == (1, 1, 0)


def test_lag_is_the_receptive_fields_right_side() -> None:
    """Against the original decoder: the first sample that changes when one late code does lies `lag` before it."""
    codec = snac("snac24").double()
    spec = snac_spec(codec)
    codes = random_codes(spec, 8)
    changed = [c.copy() for c in codes]
    changed[-1][20] = (changed[-1][20] + 1) % spec.codebook_size
    first = np.flatnonzero(offline(codec, spec, codes) != offline(codec, spec, changed))[0]
    assert 20 * spec.hop - first == read_plan(codec, spec).lag_samples == 4757


def test_mimi_uses_only_the_levels_of_the_spec() -> None:
    codec, spec = mimi()
    lookup = read_plan(codec, spec).ops[0]
    assert isinstance(lookup, Lookup) and lookup.groups == (0, 1, 1)


def test_halved_rounds_weights_and_keeps_biases() -> None:
    codec = snac("snac24")
    decoder = read_plan(codec, snac_spec(codec))
    full, half = decoder.ops[1], halved(decoder).ops[1]
    assert isinstance(full, Conv) and isinstance(half, Conv)
    assert np.array_equal(half.weight, full.weight.astype(np.float16)) and half.bias is full.bias
    assert not np.array_equal(half.weight, full.weight)


def test_other_codecs_are_refused() -> None:
    spec = snac_spec(snac("snac24"))
    with pytest.raises(CheckpointError, match="Linear cannot be streamed; use SNAC or Mimi"):
        read_plan(nn.Linear(2, 2), spec)


def test_unknown_layers_are_refused() -> None:
    codec = snac("snac24")
    codec.decoder.model[-1] = nn.Softmax()
    with pytest.raises(CheckpointError, match="layers.6: a Softmax cannot be streamed"):
        read_plan(codec, snac_spec(codec))


@pytest.mark.parametrize(
    "field, value", [("pad_mode", "replicate"), ("use_causal_conv", False), ("hidden_act", "relu")]
)
def test_mimi_of_another_make_is_refused(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{field} {value!r}"):
        read_plan(*mimi(**{field: value}))


def test_planning_leaves_the_codec_as_it_is() -> None:
    codec = snac("snac24")
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    read_plan(codec, snac_spec(codec))
    assert all(torch.equal(before[name], tensor) for name, tensor in codec.state_dict().items())
