"""The baseline: our torch fp32 model doing what the published Mini-Omni code does, wasteful parts included.

30 s window; both rows prefilled whole; the joint head (181120 rows for Mini-Omni) on both rows and every prompt
position; both rows kept to the end; codec chunks of 4 frames, each decoded on its own.
(gpt-omni/mini-omni, inference.py, run_AT_batch_stream.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from edgeomni import audio, prompts, tokens
from edgeomni.arrays import F32, I64
from edgeomni.model.omni import OmniModel

CHUNK_FRAMES = 4


@dataclass
class Timings:
    """Seconds, from the moment the samples are there."""

    mel: float = 0.0
    encoder: float = 0.0
    prefill: float = 0.0
    first_audio: float = 0.0
    frames: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)


@torch.inference_mode()
def respond(model: OmniModel, samples: F32, codec_frames: I64, frames: int) -> Timings:
    """One two-row aa turn of `frames` LLM frames; the ids that reach the codec are `codec_frames` [n, K]."""
    out, began = Timings(), perf_counter()
    spec, layout = model.spec, model.spec.layout
    mel = audio.log_mel(samples, spec.front_end, 2 * spec.encoder.context)
    out.mel = perf_counter() - began
    features = model.encode(torch.from_numpy(mel)[None])[0, : audio.feature_count(len(samples), spec.front_end)]
    out.encoder = perf_counter() - began - out.mel
    prompt = prompts.build(spec, "aa", features=len(features), two_row=True)
    cache = model.new_cache(2, spec.context)
    since = perf_counter()
    text, speech = _joint_step(model, torch.from_numpy(prompt.ids), features, cache)
    out.prefill = perf_counter() - since
    pad = tokens.audio_constant(layout, layout.pad_a)[:, 0]
    for index in range(1, frames):
        since = perf_counter()
        said = tokens.shift_audio(layout, speech[0].argmax(-1).numpy())
        word = int(text[1].argmax())
        ids = torch.from_numpy(np.stack([np.append(said, word), np.append(pad, word)])[:, :, None])
        text, speech = _joint_step(model, ids, None, cache)
        out.frames.append(perf_counter() - since)
        done = index - layout.streams + 1
        if done > 0 and done % CHUNK_FRAMES == 0:
            _chunk(model, codec_frames[done - CHUNK_FRAMES : done], out)
            out.first_audio = out.first_audio or perf_counter() - began
    return out


def _joint_step(model: OmniModel, ids: Any, features: Any, cache: Any) -> tuple[Any, Any]:
    """All positions of both rows through body and joint head; the last position's logits of each row."""
    hidden, _ = model.hidden(model.embed(ids, () if features is None else [(1, features)]), cache)
    joint = functional.linear(hidden, model.embedding.weight)[:, -1]
    layout = model.spec.layout
    speech = joint[:, layout.text_vocab :].unflatten(-1, (layout.streams, layout.audio_vocab))
    return joint[:, : layout.text_vocab], speech


def _chunk(model: OmniModel, frames: I64, out: Timings) -> None:
    since = perf_counter()
    codes = tokens.frames_to_codes(frames, model.spec.codec)
    model.decode_codes([torch.from_numpy(c)[None] for c in codes])
    out.chunks.append(perf_counter() - since)
