"""Sound -> codec frames: what a model's codec makes of an answer, and what tells one codec's frames from another's."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn
from transformers import MimiModel

from ..arrays import F32, I64
from ..errors import AudioError
from ..model.tensors import translated
from ..spec import CodecSpec
from ..tokens import codes_to_frames

_DECODES = ("decoder.", "decoder_transformer.", "upsample.")
"""Modules of SNAC and Mimi that encoding does not use."""


def codec_frames(codec: nn.Module, spec: CodecSpec, samples: F32) -> I64:
    """Samples [S] at the codec's rate -> codec frames int64 [ceil(S / frame_samples), K], the last one padded with
    zeros.

    `codec`: SNAC (arXiv 2410.14411) or MimiModel (arXiv 2410.00037). SNAC with attention windows pads further, to
    whole windows; what it adds is cut off. Raises AudioError where there are no samples, and CheckpointError for a
    codec whose encoder does not fit its quantizers.
    """
    if not len(samples):
        raise AudioError("there are no samples to encode; record again")
    frames = -(-len(samples) // spec.frame_samples)
    weight = next(codec.parameters())
    sound = torch.from_numpy(np.pad(samples, (0, frames * spec.frame_samples - len(samples))))[None, None].to(weight)
    message = "the codec of this checkpoint does not encode; train on data with answer_codes, or swap the codec"
    with translated(message), torch.inference_mode():
        if isinstance(codec, MimiModel):
            levels = list(codec.encode(sound, num_quantizers=spec.streams).audio_codes[0])
        else:
            levels = [codes[0] for codes in codec.encode(sound)]
    cut = [ids[: frames * each].cpu().numpy() for ids, each in zip(levels, spec.ids_per_level, strict=True)]
    return codes_to_frames(cut, spec)


def codec_digest(codec: nn.Module) -> str:
    """SHA-256 of the weights with which a codec encodes. Training its decoder alone does not change it."""
    whole = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        if not name.startswith(_DECODES):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
