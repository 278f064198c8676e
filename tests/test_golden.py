"""The torch model against what the published Mini-Omni code computed (tests/golden)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Golden

from edgeomni.model import codecs, encoders

TASKS = ("AA", "AT", "ASR", "TA", "TT", "BATCH")


def golden_logits(model: Any, golden: Golden, task: str) -> np.ndarray:
    """Our logits of the golden prompt [rows, T, joint_vocab], text first."""
    ids = torch.from_numpy(golden[f"{task}_prompt_ids"])
    with torch.inference_mode():
        features = [] if task in ("TA", "TT") else [(1, model.adapter(torch.from_numpy(golden.features())))]
        text, audio = model(ids, features)
    ours: np.ndarray = torch.cat([text, audio.flatten(2)], dim=-1).numpy()
    return ours


@pytest.mark.parametrize("task", TASKS)
def test_logits(golden: Golden, golden_model: Any, task: str) -> None:
    ours = golden_logits(golden_model, golden, task)
    assert np.abs(ours[:, -1] - golden[f"{task}_logits_last"]).max() < 1e-4
    if f"{task}_logits_all" in golden.arrays:
        assert np.abs(ours - golden[f"{task}_logits_all"]).max() < 1e-4


def test_encoder_on_the_padded_window(golden: Golden, golden_model: Any) -> None:
    mel = torch.from_numpy(golden.mel(2 * golden_model.spec.encoder.context))
    with torch.inference_mode():
        features = encoders.encode(golden_model.encoder, mel[None])[0].numpy()
    expected = golden.features()
    assert np.abs(features[: len(expected)] - expected).max() < 1e-4


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The published code ran on two threads, and convolutions add up in another order on another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_offline_codec_with_noise_off(golden: Golden, golden_model: Any) -> None:
    """Where the golden codec magnifies rounding (sin of large numbers), its own distance to float64 is the measure."""
    levels = len(golden_model.spec.codec.vq_strides)
    codes = [torch.from_numpy(golden[f"AA_codes{i}"]).long() for i in range(levels)]
    exact = codecs.decode(copy.deepcopy(golden_model.codec).double(), codes).numpy()
    rounding = np.abs(golden["AA_wave"] - exact).max()
    error = np.abs(golden_model.decode_codes(codes).numpy() - golden["AA_wave"])
    assert error.max() < max(1e-4, 1.5 * rounding) and np.quantile(error, 0.99) < 1e-4


def test_special_ids(golden: Golden, golden_model: Any) -> None:
    layout = golden_model.spec.layout
    assert {name: getattr(layout, name) for name in golden.meta["ids"]} == golden.meta["ids"]


@pytest.mark.usefixtures("two_threads")
def test_every_chunk_of_the_stream(golden: Golden, golden_model: Any) -> None:
    """The published stream decodes each chunk on its own and casts to int16 without clipping: 1.0 becomes -32768."""
    levels = len(golden_model.spec.codec.vq_strides)
    for i in range(int(golden["STREAM_nchunks"])):
        codes = [torch.from_numpy(golden[f"STREAM_codes{level}"][i])[None].long() for level in range(levels)]
        pcm = golden_model.decode_codes(codes).double().numpy() * 32768
        error = np.abs((pcm - golden["STREAM_pcm"][i] + 32768) % 65536 - 32768)
        assert np.quantile(error, 0.99) < 1 + 32768 * 1e-4
