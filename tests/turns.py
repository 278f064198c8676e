"""One turn of the loop on scripted components, without a Session: what the tests of the loop share.

The layout has three audio streams (strides 2, 1; codebook 10) and 100 text ids: eot 92, pad_t 93; unshifted eoa 10,
pad_a 11, so that the three streams' pad_a are rows 111, 129 and 147 of the joint vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fakes import script, small_spec

from edgeomni import generate as loop
from edgeomni import prompts
from edgeomni.components import Components, Features
from edgeomni.generate import Frame, Options, Samples, Stop
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes import fake
from edgeomni.sampling import Sampling
from edgeomni.spans import Spans
from edgeomni.spec import OmniSpec

SPEC = small_spec(strides=(2, 1), codebook=10, context=300)
EOA, PAD_A, EOT, PAD_T = 10, 11, 92, 93
PAD_ROWS = [111, 129, 147]


class Recorder(fake.FakeLanguageModel):
    """The scripted LLM, which also keeps its states and what `frame_ids` was given."""

    def __init__(self, spec: OmniSpec, frames: Sequence[Sequence[int]]) -> None:
        super().__init__(spec, frames)
        self.kept: list[fake.FakeState] = []
        self.chosen: list[tuple[int, int, list[float], Sampling]] = []

    def start(self, rows: int, max_frames: int) -> fake.FakeState:
        self.kept.append(super().start(rows, max_frames))
        return self.kept[-1]

    def frame_ids(self, hidden: Any, row: int, text_id: int, draws: Any, rule: Sampling) -> Any:
        self.chosen.append((row, text_id, list(draws), rule))
        return super().frame_ids(hidden, row, text_id, draws, rule)


class Asking(Interrupt):
    """An interrupt that is set as soon as `question` says so."""

    def __init__(self, question: Callable[[], bool]) -> None:
        super().__init__()
        self._question = question

    def is_set(self) -> bool:
        if self._question():
            self.set()
        return super().is_set()

    def check(self) -> None:
        self.is_set()
        super().check()


class Turn:
    """One turn of `frames` scripted frames: its events, and the parts that answered."""

    def __init__(
        self,
        frames: Sequence[Sequence[int]],
        task: str = "aa",
        options: Options | None = None,
        *,
        spec: OmniSpec = SPEC,
        two_row: bool = True,
        llm: Recorder | None = None,
        codec: fake.FakeCodec | None = None,
        spans: Spans | None = None,
        cancelled: Callable[[], bool] | None = None,
        features: int = 4,
        on_event: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self.llm = llm or Recorder(spec, frames)
        self.codec, self.spans = codec or fake.FakeCodec(spec), spans or Spans()
        spoken = task in ("aa", "at", "asr")
        asked = {"features": features} if spoken else {"text_ids": [5] * features}
        self.prompt = prompts.build(spec, task, two_row=two_row, **asked)  # type: ignore[arg-type]
        given = [Features(1, np.zeros((features, spec.body.width), np.float32))] if spoken else []
        parts = Components(fake.FakeEncoder(spec), self.llm, self.codec)
        self.events = []
        listening = () if cancelled is None else (Asking(cancelled),)
        for event in loop.generate(parts, spec, task, self.prompt, given, options or Options(), self.spans, *listening):
            self.events.append(event)
            on_event(event)
        self.frames = [e for e in self.events if isinstance(e, Frame)]
        self.text = [f.text for f in self.frames]
        stops = [e for e in self.events if isinstance(e, Stop)]
        assert stops == self.events[-1:], "one Stop, and it comes last"
        self.stop = stops[0]

    @property
    def samples(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *[e.samples for e in self.events if isinstance(e, Samples)]])


def plain(text: list[int], frames: int, eoa: bool = True) -> list[list[int]]:
    return script(SPEC, frames, text, eoa)
