"""Sessions that answer with known texts and known sounds, and a recogniser that knows those sounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fakes import script, small_spec
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeomni import Session
from edgeomni.arrays import F32
from edgeomni.components import Components
from edgeomni.runtimes import fake
from edgeomni.spec import OmniSpec

SPEC = small_spec(context=600)
RATE = SPEC.codec.sample_rate


def tokenizer_json(texts: Sequence[str]) -> str:
    """One id per word, in the order in which they first come."""
    words = dict.fromkeys(word for text in texts for word in text.split())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(tokenizer.to_str())


def tone(index: int) -> F32:
    """A fifth of a second at a level that names `index`; `Ear` reads it off."""
    return np.full(RATE // 5, (index + 1) / 100, np.float32)


class Ear:
    """Hears sentence i of `sentences` in `tone(i)`."""

    name = "ear"

    def __init__(self, sentences: Sequence[str]) -> None:
        self.sentences, self.calls = sentences, 0

    def hear(self, samples: F32) -> str:
        self.calls += 1
        return self.sentences[round(float(samples[len(samples) // 2]) * 100) - 1]


class Llm(fake.FakeLanguageModel):
    """Answers the n-th question with the n-th script."""

    def __init__(self, spec: OmniSpec, scripts: Sequence[list[list[int]]]) -> None:
        super().__init__(spec, scripts[0])
        self.scripts, self.asked = scripts, 0

    def start(self, rows: int, max_frames: int) -> fake.FakeState:
        self.frames = self.scripts[self.asked % len(self.scripts)]
        self.asked += 1
        return super().start(rows, max_frames)


class Player(fake.FakeCodec):
    """Plays the n-th sound to the n-th answer, whatever its codes are."""

    def __init__(self, spec: OmniSpec, sounds: Sequence[F32]) -> None:
        super().__init__(spec)
        self.sounds, self.played = sounds, 0

    def decode(self, codes: Any, state: Any, last: bool) -> F32:
        super().decode(codes, state, last)
        if not last:
            return np.zeros(0, np.float32)
        self.played += 1
        return self.sounds[(self.played - 1) % len(self.sounds)].copy()


def answering(texts: Sequence[str], sounds: Sequence[F32] = (), words: Sequence[str] = (), **changes: Any) -> Session:
    """A session whose n-th answer is texts[n], spoken as sounds[n]. `words`: more that its tokenizer knows."""
    spec = small_spec(**{"context": 600, **changes})
    known = tokenizer_json(["?", *texts, *words])
    loaded = Tokenizer.from_str(known)
    scripts = [script(spec, 8 + len(text.split()), loaded.encode(text).ids) for text in texts]
    codec = Player(spec, sounds) if sounds else fake.FakeCodec(spec)
    return Session(Components(fake.FakeEncoder(spec), Llm(spec, scripts), codec), spec, known)
