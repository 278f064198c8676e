"""Tiny random codecs of every layout, and their offline decode by the original packages: the tests' reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MimiConfig, MimiModel

from edgeomni.arrays import F32, I64
from edgeomni.runtimes.common.streaming_codec import StreamingCodec
from edgeomni.spec import CodecSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from snac import SNAC
    from snac.layers import NoiseBlock

Codec = Any
"""SNAC or MimiModel."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "snac24": {"decoder_rates": [8, 8, 4, 2], "vq_strides": [4, 2, 1], "attn_window_size": None},
    "snac32": {"decoder_rates": [8, 8, 3, 2], "vq_strides": [8, 4, 2, 1], "attn_window_size": 32},
    "snac44": {"decoder_rates": [7, 7, 3, 3], "vq_strides": [8, 4, 2, 1], "attn_window_size": 32},
    "snac_dense": {"decoder_rates": [3, 2], "vq_strides": [2, 1], "attn_window_size": None, "depthwise": False},
}


def snac(layout: str, seed: int = 0, decoder_dim: int = 64, **sizes: Any) -> Codec:
    torch.manual_seed(seed)
    config = {"encoder_dim": 4, "codebook_size": 64, "codebook_dim": 4, "sampling_rate": 8000} | LAYOUTS[layout]
    codec = SNAC(decoder_dim=decoder_dim, encoder_rates=config["decoder_rates"][::-1], **config | sizes).eval()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
            elif name.endswith("original0"):  # the weight norm's gains: keep the signal alive through all layers
                parameter.mul_(1.15)
    return codec


def saved_snac(folder: Path) -> Codec:
    return SNAC.from_pretrained(str(folder))


def snac_spec(codec: Codec) -> CodecSpec:
    return CodecSpec(
        "snac",
        codec.sampling_rate,
        codec.codebook_size,
        tuple(codec.vq_strides),
        math.prod(codec.decoder_rates),
        codec.attn_window_size,
    )


def mimi(seed: int = 0, **sizes: Any) -> tuple[Codec, CodecSpec]:
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "num_filters": 4,
        "codebook_size": 32,
        "codebook_dim": 16,
        "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "upsample_groups": 32,
        "sliding_window": 7,
        "layer_scale_initial_scale": 0.5,
        "upsampling_ratios": [4, 3, 2],
        "sampling_rate": 1200,
    } | sizes
    codec = MimiModel(MimiConfig(**config)).eval()
    for layer in codec.quantizer.modules():
        if hasattr(layer, "embed_sum"):
            layer.embed_sum.normal_()
    hop = round(codec.config.sampling_rate / codec.config.frame_rate)
    return codec, CodecSpec("mimi", codec.config.sampling_rate, codec.config.codebook_size, (1,) * 3, hop)


def random_codes(spec: CodecSpec, frames: int, seed: int = 0) -> list[I64]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec.codebook_size, frames * n) for n in spec.ids_per_level]


def set_noise(codec: Codec, noise: Sequence[F32] | None) -> None:
    """Gives every NoiseBlock its values (None: off) in place of fresh random ones."""
    blocks = [m for m in codec.modules() if isinstance(m, NoiseBlock)]
    for i, block in enumerate(blocks):
        values = None if noise is None else torch.from_numpy(noise[i])
        block.forward = lambda x, b=block, n=values: x if n is None else x + n * b.linear(x)


@torch.inference_mode()
def offline(codec: Codec, spec: CodecSpec, codes: Sequence[I64], noise: Sequence[F32] | None = None) -> F32:
    """Waveform of the whole answer at once; with attention windows, of the codes padded with id 0, then cropped."""
    frames = len(codes[0]) // spec.ids_per_level[0]
    if isinstance(codec, MimiModel):
        return codec.decode(torch.from_numpy(np.stack(codes))[None]).audio_values[0, 0].numpy()
    multiple = math.lcm(spec.attn_window or 1, spec.vq_strides[0]) // spec.vq_strides[0]
    padded = [np.pad(c, (0, -frames % multiple * n)) for c, n in zip(codes, spec.ids_per_level, strict=True)]
    set_noise(codec, noise)
    return codec.decode([torch.from_numpy(c)[None] for c in padded])[0, 0].numpy()[: frames * spec.frame_samples]


def pushes(total: int, first: int, seed: int, largest: int = 5) -> list[int]:
    """Sizes that sum up to `total`: `first`, then random ones."""
    rng, sizes = np.random.default_rng(seed), [min(first, total)]
    while sum(sizes) < total:
        sizes.append(min(int(rng.integers(1, largest + 1)), total - sum(sizes)))
    return sizes


def stream(
    decoder: StreamingCodec[Any],
    codes: Sequence[I64],
    sizes: Sequence[int],
    *,
    seed: int | None = None,
    empty_end: bool = False,
) -> list[F32]:
    """What each push of `sizes` codec frames gives; `empty_end` ends the stream with a push of no codes."""
    per_level, state, at = decoder.spec.ids_per_level, decoder.open(seed), 0
    chunks: list[F32] = []
    for i, n in enumerate(sizes):
        part = [c[at * k : (at + n) * k] for c, k in zip(codes, per_level, strict=True)]
        at += n
        chunks.append(decoder.decode(part, state, last=i == len(sizes) - 1 and not empty_end))
    if empty_end:
        chunks.append(decoder.decode([c[:0] for c in codes], state, last=True))
    return chunks
