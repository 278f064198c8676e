"""Two runtimes on the same input: what the gate's figures are made of. Knows components, no engine.

The LLM is compared under teacher forcing: the reference speaks a two-row `aa` turn with seeded sampling, and the
other is fed the same ids through the same calls (prefill, fork, steps, drop), so that every path is walked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import F32, I32, I64
from ..components import CodecDecoder, Encoder, Features, LanguageModel
from ..generate import next_ids
from ..prefill import prefill
from ..probe_sound import probe as probe
from ..prompts import build
from ..sampling import Sampler, Sampling, choose_frame
from ..spec import TASKS, CodecSpec, OmniSpec
from ..tokens import frames_to_codes, undelay

_FRAMES, _FEATURES = 68, 80
_POSITIONS = 200
"""Positions compared per head, at least: below that 99.5 % would mean "all"."""
_PUSHES = (1, 3, 2, 4)
"""Codec frames per push beyond the first, in turn."""


@dataclass(frozen=True)
class Script:
    """One turn to be walked: its prompt's features [F, D] and how many frames it takes; `ids` once it was spoken."""

    features: F32
    frames: int
    seed: int
    ids: tuple[I32, ...] = ()
    """Unshifted [K+1] ids of each frame (audio streams, then text)."""

    @property
    def audio(self) -> I64:
        """[K, frames]"""
        return np.stack([i[:-1] for i in self.ids], axis=1).astype(np.int64)


@dataclass(frozen=True)
class Logits:
    """What the heads said over all frames and rows: text [N, text_vocab], audio [M, K, audio_vocab].

    A TTS adapter speaks for row 0 alone, so M may be less than N.
    """

    text: F32
    audio: F32

    def heads(self) -> dict[str, F32]:
        """One [N, V] per head."""
        return {"text": self.text, **{f"audio{k}": self.audio[:, k] for k in range(self.audio.shape[1])}}


def encoded(encoder: Encoder, mels: Sequence[F32]) -> list[F32]:
    return [encoder.encode(mel) for mel in mels]


def scripts(spec: OmniSpec, features: F32) -> list[Script]:
    """Turns, not yet spoken, that together give every head its positions within the model's context."""
    frames = min(_FRAMES, spec.context // 2)
    room = spec.context - frames - 3
    positions = frames if spec.tts_layers else frames + frames // 2
    turns = -(-_POSITIONS // positions)
    length = max(1, min(_FEATURES, room, len(features) // turns))
    return [Script(features[i * length : (i + 1) * length], frames, seed=i) for i in range(turns)]


def speak(llm: LanguageModel[Any, Any], spec: OmniSpec, script: Script) -> tuple[Script, Logits]:
    """Lets `llm` answer with seeded sampling; returns the script with its ids, and the logits."""
    sampler = Sampler(Sampling(temperature=1.0, top_k=50, seed=script.seed))
    ids: list[I32] = []

    def choose(_: int, text: F32, audio: F32) -> I32:
        spoken = choose_frame(audio, sampler.draws(len(audio)), sampler.rule)
        ids.append(np.array([*spoken, sampler.text(text)], np.int32))
        return ids[-1]

    logits = _walk(llm, spec, script, choose)
    return Script(script.features, script.frames, script.seed, tuple(ids)), logits


def follow(llm: LanguageModel[Any, Any], spec: OmniSpec, script: Script) -> Logits:
    """Feeds `llm` a spoken script's ids and returns its own logits."""
    return _walk(llm, spec, script, lambda i, text, audio: script.ids[i])


def _walk(
    llm: LanguageModel[Any, Any], spec: OmniSpec, script: Script, choose: Callable[[int, F32, F32], I32]
) -> Logits:
    """A two-row turn whose second row is dropped half way."""
    prompt = build(replace(spec, tasks=TASKS), "aa", features=len(script.features), two_row=True)
    state = llm.start(2, prompt.length + script.frames)
    hidden = prefill(llm, prompt.ids, [Features(prompt.feature_start, script.features)], state)
    rows, text, audio = 2, list[F32](), list[F32]()
    for i in range(script.frames):
        text += [llm.text_logits(hidden, row) for row in range(rows)]
        given = script.ids[i][:-1].astype(np.int64) if script.ids else None
        heard = [llm.audio_logits(hidden, row, given) for row in range(1 if spec.tts_layers else rows)]
        audio += heard
        ids = choose(i, text[-1], heard[0])
        if i + 1 == script.frames:
            break
        if i == script.frames // 2:
            llm.drop(state, 1)
            rows = 1
        hidden = llm.forward(next_ids(spec.layout, ids[:-1].astype(np.int64), int(ids[-1]), rows), (), state)
    return Logits(np.stack(text), np.stack(audio))


def joined(parts: Sequence[Logits]) -> Logits:
    """All turns' positions in one."""
    return Logits(np.concatenate([p.text for p in parts]), np.concatenate([p.audio for p in parts]))


def emitted_codes(spec: OmniSpec, spoken: Sequence[Script]) -> list[I64]:
    """Codes per level of the codec frames that the scripts' ids form.

    Ids that are no codebook entries, which a random model emits now and then, become random valid ones.
    """
    frames = np.concatenate([undelay(s.audio) for s in spoken])
    spare = np.random.default_rng(0).integers(0, spec.codec.codebook_size, frames.shape)
    return frames_to_codes(np.where(frames < spec.codec.codebook_size, frames, spare), spec.codec)


def decoded(codec: CodecDecoder[Any], spec: CodecSpec, codes: Sequence[I64]) -> F32:
    """Codes per level -> wave [S], pushed through the codec in chunks of changing size, as an answer would be."""
    frames, step = len(codes[0]) // spec.ids_per_level[0], codec.push_multiple
    state, at, parts = codec.open(), 0, list[F32]()
    sizes = [max(codec.first_push, 1), *(n * step for n in _PUSHES * frames)]
    for size in sizes:
        end = min(frames, at + -(-size // step) * step)
        chunk = [c[at * n : end * n] for c, n in zip(codes, spec.ids_per_level, strict=True)]
        parts.append(codec.decode(chunk, state, end == frames))
        if (at := end) == frames:
            break
    return np.concatenate(parts)
