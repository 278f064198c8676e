"""Sound -> codec frames, for every codec layout, against the original packages' own encoders."""

from __future__ import annotations

from typing import Any

import codec_models
import numpy as np
import pytest
import torch

from edgeomni.arrays import F32
from edgeomni.errors import AudioError
from edgeomni.spec import CodecSpec
from edgeomni.tokens import frames_to_codes
from edgeomni.train.codes import codec_digest, codec_frames
from edgeomni.train.prepare import encode_codes

KINDS = [*codec_models.LAYOUTS, "mimi"]


def made(kind: str) -> tuple[Any, CodecSpec]:
    if kind == "mimi":
        return codec_models.mimi()
    rates = codec_models.LAYOUTS[kind]["decoder_rates"]
    codec = codec_models.snac(kind, decoder_dim=16 * 2 ** len(rates))
    return codec, codec_models.snac_spec(codec)


def sound(samples: int) -> F32:
    return np.random.default_rng(samples).normal(size=samples).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [0, 1, -1])
def test_every_layout(kind: str, extra: int) -> None:
    model, spec = made(kind)
    samples = sound(3 * spec.frame_samples + extra)
    frames = codec_frames(model, spec, samples)
    count = 3 + (extra > 0)
    assert frames.shape == (count, spec.streams) and frames.dtype == np.int64
    wave = torch.from_numpy(np.pad(samples, (0, count * spec.frame_samples - len(samples))))[None, None]
    with torch.inference_mode():
        whole = list(model.encode(wave).audio_codes[0]) if spec.kind == "mimi" else [c[0] for c in model.encode(wave)]
    for ours, theirs in zip(frames_to_codes(frames, spec), whole, strict=False):
        np.testing.assert_array_equal(ours, theirs[: len(ours)].numpy())
    assert len(set(ours.tolist())) > 1  # the finest level's, or any order would do


def test_of_a_model(tiny_model: Any) -> None:
    samples = sound(5000)
    np.testing.assert_array_equal(
        encode_codes(tiny_model, samples), codec_frames(tiny_model.codec, tiny_model.spec.codec, samples)
    )


def test_nothing_to_encode(tiny_model: Any) -> None:
    with pytest.raises(AudioError, match="no samples"):
        encode_codes(tiny_model, np.zeros(0, np.float32))


@pytest.mark.parametrize("kind", ["snac_dense", "mimi"])
def test_a_digest_is_of_what_encodes(kind: str) -> None:
    """Every weight that encoding depends on changes the digest, and the decoder's do not."""
    model, spec = made(kind)
    digest = codec_digest(model)
    samples = sound(4 * spec.frame_samples)
    before = codec_frames(model, spec, samples)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    idle = []
    for name, tensor in model.state_dict().items():
        tensor.add_(1)
        if codec_digest(model) == digest:
            idle.append(name)
        tensor.copy_(kept[name])
    assert idle and all("decoder" in name or "upsample" in name for name in idle)
    assert len(idle) < len(kept) - 10
    for name in idle:
        model.state_dict()[name].add_(1)
    np.testing.assert_array_equal(codec_frames(model, spec, samples), before)
    model.load_state_dict(kept)
    assert codec_digest(model) == digest
