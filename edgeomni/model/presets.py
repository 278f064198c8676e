"""Presets with random weights, for benchmarks and tests: real shapes and tiny ones, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import sinusoids

from ..errors import UsageError
from ..sampling import check_seed
from ..spec import AdapterSpec, BodySpec, EncoderSpec, FrontEndSpec, OmniSpec, TokenLayout
from . import codecs
from .omni import OmniModel, fill, skeleton
from .preset_words import made_up, tokenizer_of, vocabulary_of
from .tensors import Shapes, shapes_of

_AUDIO_SPECIALS = 64
_TEXT_SPECIALS = 64
_LOGIT_STD = 1.5
_QUIET_SPECIALS = 0.1
_WAVE_STD = 0.15
_ATTENTION_GAIN = 2.5
_BRANCH_GAIN = 1.0


@dataclass(frozen=True)
class Preset:
    encoder: EncoderSpec
    adapter: AdapterSpec
    body: BodySpec
    text_words: int
    snac: dict[str, Any]
    context: int = 2048
    n_fft: int = 400
    hop: int = 160
    padded_window: bool = True
    encoder_gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors on the encoder's weights: its two convolutions, and queries and keys of attention. With ones, the
    sinusoids that are added to the sound are twice as large as the sound, and CTC training from nothing takes twice as
    long to hear its first words (benchmarks/LOG.md)."""


def _snac(encoder_dim: int, decoder_dim: int, codebook_size: int) -> dict[str, Any]:
    """SNAC 24 kHz's structure (hubertsiuzdak/snac_24khz, config.json)."""
    return {
        "kind": "snac",
        "sampling_rate": 24000,
        "encoder_dim": encoder_dim,
        "encoder_rates": [2, 4, 8, 8],
        "decoder_dim": decoder_dim,
        "decoder_rates": [8, 8, 4, 2],
        "attn_window_size": None,
        "codebook_size": codebook_size,
        "codebook_dim": 8,
        "vq_strides": [4, 2, 1],
        "noise": True,
        "depthwise": True,
    }


def _snac_16khz(encoder_dim: int, decoder_dim: int, codebook_size: int) -> dict[str, Any]:
    """Sizes of a speech codec with frames of 128 ms: the defaults of edgeomni/train/codec_config.py."""
    return {
        **_snac(encoder_dim, decoder_dim, codebook_size),
        "sampling_rate": 16000,
        "encoder_rates": [4, 4, 4, 8],
        "decoder_rates": [8, 4, 4, 4],
        "noise": False,
    }


def _qwen2(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> BodySpec:
    return BodySpec(
        "qwen2", layers, width, heads, kv_heads, head_dim=width // heads, ffn=ffn, rope_theta=1e6, qkv_bias=True
    )


PRESETS = {
    "mini-omni": Preset(
        EncoderSpec(layers=12, width=768, heads=12, ffn=3072),
        AdapterSpec("swiglu", hidden=4864),
        _qwen2(24, 896, 14, 2, 4864),
        text_words=151936,
        snac=_snac(48, 1024, 4096),
    ),
    # Mel frames are 20 ms apart, so that one feature is 40 ms: short sequences are what two cores can train.
    "nano": Preset(
        EncoderSpec(layers=4, width=192, heads=4, ffn=768, context=200),
        AdapterSpec("swiglu", hidden=256),
        _qwen2(5, 256, 4, 2, 640),
        text_words=448,
        snac=_snac_16khz(16, 256, 512),
        context=512,
        n_fft=512,
        hop=320,
        padded_window=False,
        encoder_gains=(1.5, 15.0, 0.5),
    ),
    "tiny": Preset(
        EncoderSpec(layers=2, width=64, heads=4, ffn=256),
        AdapterSpec("swiglu", hidden=256),
        _qwen2(3, 128, 4, 2, 256),
        text_words=448,
        snac=_snac(4, 64, 256),
    ),
}


def check(name: str) -> None:
    """Raises UsageError for an unknown name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"no preset {reprlib.repr(name)}; known are {', '.join(PRESETS)}")


def spec_of(name: str) -> OmniSpec:
    """The sizes of that preset. Raises UsageError for an unknown name."""
    check(name)
    return _spec_of(PRESETS[name])


def preset(name: str, seed: int = 0, words: Collection[str] = ()) -> OmniModel:
    """OmniModel of that shape with random weights: deterministic, logits spread, codec audible but below 1.

    Rows of special tokens are small, so that greedy answers consist of words and codec entries. With `words`, these
    are its vocabulary (`vocabulary_of`), and the embedding is as large as they need. Raises UsageError for an unknown
    name or a seed that is none.
    """
    check(name)
    check_seed(seed)
    shape = PRESETS[name]
    vocabulary = vocabulary_of(words) if words else made_up(shape.text_words)
    shape = replace(shape, text_words=len(vocabulary))
    model = skeleton(_spec_of(shape), shape.snac)
    fill(model, _draw_all(shapes_of(model.state_dict()), seed))
    _quiet_specials(model)
    _scale_encoder(model, shape.encoder_gains)
    _level_codec(model)
    model.tokenizer_json = tokenizer_of(vocabulary)
    model.provenance = _provenance(name, seed, vocabulary if words else [])
    model.licences = dict.fromkeys(("encoder", "llm", "codec"), "random weights, no licence needed")
    return model


def word_tokenizer(words: int) -> str:
    """tokenizer.json with one printable, lower-case word per id; text is split at blanks and punctuation."""
    return tokenizer_of(made_up(words))


def _provenance(name: str, seed: int, words: list[str]) -> dict[str, Any]:
    """What the weights are. Their own vocabulary is part of the hash: an adapter of one does not fit another."""
    own = hashlib.sha256(json.dumps(words).encode()).hexdigest() if words else ""
    return {
        "weights": "random",
        "kind": "preset",
        "source": f"{name}, seed {seed}" + (f", {len(words)} words of its own" if words else ""),
        "source_hash": f"preset:{name}:{seed}" + (f":{own}" if words else ""),
    }


def _spec_of(shape: Preset) -> OmniSpec:
    codec = codecs.spec_of(shape.snac)
    layout = TokenLayout(
        shape.text_words + _TEXT_SPECIALS,
        codec.codebook_size + _AUDIO_SPECIALS,
        codec.codebook_size,
        codec.streams,
        _TEXT_SPECIALS,
    )
    return OmniSpec(
        front_end=_front_end(shape),
        encoder=shape.encoder,
        adapter=shape.adapter,
        body=shape.body,
        layout=layout,
        codec=codec,
        context=shape.context,
        padded_window=shape.padded_window,
    )


def _front_end(shape: Preset) -> FrontEndSpec:
    rate = FrontEndSpec().sample_rate
    window_s = shape.encoder.context * 2 * shape.hop // rate
    return FrontEndSpec(sample_rate=rate, n_fft=shape.n_fft, hop=shape.hop, window_s=window_s)


def _draw_all(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(shapes, pool.map(lambda name: draw(name, shapes[name], seed), shapes), strict=True))


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """One tensor of the state dict: normal weights of unit gain, norms of 1, snake alphas of 0.5 to 1.5.

    Each tensor has its own stream of numbers, so that they can be drawn side by side and in any order.
    """
    if name == "encoder.embed_positions.weight":
        return sinusoids(*shape)
    if name.endswith(".original0"):
        return torch.full(shape, _weight_norm_gain(name))
    if "norm" in name and name.endswith("weight") and len(shape) == 1:
        return torch.ones(shape)
    stream = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    if name.endswith(".alpha"):
        return torch.from_numpy(stream.uniform(0.5, 1.5, shape).astype(np.float32))
    return torch.from_numpy(stream.standard_normal(shape, np.float32)).mul_(_std_of(name, shape))


def _std_of(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(".bias"):
        return 0.02
    if name.startswith("codec."):  # the length of its rows is set by the weight norm
        return 1.0
    if name.startswith(("embedding.", "text_head.", "audio_head.")):
        return _LOGIT_STD / math.sqrt(shape[1])
    return _gain_of(name, shape[0]) / math.sqrt(math.prod(shape[1:]))


def _gain_of(name: str, out: int) -> float:
    """Output over input of a linear map. In the body: attention that chooses, branches that match a frame's input.

    Without it a causal average of all frames drowns the newest one, and greedy answers stand still.
    """
    if not name.startswith(("body.", "tts.")):
        return 0.8
    if "q_proj" in name or "k_proj" in name:
        return _ATTENTION_GAIN
    return _BRANCH_GAIN / math.sqrt(out) if "o_proj" in name or "down_proj" in name else 1.0


def _weight_norm_gain(name: str) -> float:
    """Row norms of SNAC's convolutions: about unit gain, residual branches (block.3 of a unit) at a third."""
    return 0.33 if ".block.3.parametrizations" in name and ".block.3.block.3." not in name else 1.0


@torch.no_grad()
def _quiet_specials(model: OmniModel) -> None:
    layout = model.spec.layout
    model.text_rows()[layout.eot :] *= _QUIET_SPECIALS
    blocks = model.audio_rows().unflatten(0, (layout.streams, layout.audio_vocab))
    blocks[:, layout.codebook_size :] *= _QUIET_SPECIALS


@torch.no_grad()
def _scale_encoder(model: OmniModel, gains: tuple[float, float, float]) -> None:
    model.encoder.conv1.weight *= gains[0]
    model.encoder.conv2.weight *= gains[1]
    for layer in model.encoder.layers:
        layer.self_attn.q_proj.weight *= gains[2]
        layer.self_attn.k_proj.weight *= gains[2]


@torch.no_grad()
def _level_codec(model: OmniModel) -> None:
    """Sets the last convolution's gain and bias from what it makes of eight frames of regular codes."""
    codec, spec = model.codec, model.spec.codec
    codes = [(torch.arange(8 * n)[None] * 7919 + 31) % spec.codebook_size for n in spec.ids_per_level]
    last = codec.decoder.model[-2]
    before_tanh = torch.atanh(model.decode_codes(codes).clamp(-0.999, 0.999))
    gain = _WAVE_STD / before_tanh.std()
    last.parametrizations.weight.original0 *= gain
    last.bias.copy_((last.bias - before_tanh.mean()) * gain)
