"""Turns by which an export chooses codes and ranges: questions of the user's data, answered by the checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import F32
from .data.sample import Sample
from .errors import DataError, EdgeOmniError, UsageError
from .evaluate.lost import question_of
from .gate.answers import Side, walk
from .question import Question
from .recorded import Recorded
from .spec import AUDIO_IN, Task
from .text import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from .model.omni import OmniModel

Say = Callable[[str], None]
OF_A_TASK = 16
"""Questions of each task. The more, the nearer the answers stay, and the longer it takes (docs/quantization.md)."""
_TOLD_EVERY = 16


@dataclass(frozen=True)
class CalibrationData:
    """Samples whose questions calibrate; of each task at most `limit`, evenly spread over the samples.

    A sample is asked as its own task, or without one as every task for which it has sound or text; answers are not
    needed. `tasks`: those to be asked (None: all that the checkpoint knows). Raises UsageError for data without
    samples and for a limit below 1.
    """

    samples: Sequence[Sample]
    tasks: Collection[Task] | None = None
    limit: int = OF_A_TASK

    def __post_init__(self) -> None:
        if not self.samples:
            raise UsageError("the data that is to calibrate the export holds no samples; give some that does")
        if self.limit < 1:
            raise UsageError(f"calibrating needs at least 1 question of each task, not {self.limit}")

    def chosen(self, tasks: Collection[Task]) -> list[tuple[Sample, Task]]:
        """The samples to be asked, and what each is asked as, for a model that knows `tasks`."""
        found = list[tuple[Sample, Task]]()
        for task in tasks if self.tasks is None else [task for task in tasks if task in self.tasks]:
            able = [
                s for s in self.samples if s.task in (None, task) and (s.audio if task in AUDIO_IN else s.text.strip())
            ]
            places = np.linspace(0, len(able) - 1, min(self.limit, len(able))).round().astype(int)
            found += [(able[i], task) for i in places]
        return found


@dataclass(frozen=True)
class Turns(Recorded):
    """Recorded turns; `digest`: sha256 of the questions' tasks, texts and samples."""

    digest: str

    def facts(self, uses: Sequence[str]) -> dict[str, str | int]:
        """What a bundle's provenance tells of its calibration; `uses`: what it was for."""
        return {
            "calibration": ", ".join(uses),
            "calibration_turns": len(self.inputs),
            "calibration_positions": sum(len(x) for x in self.inputs),
            "calibration_questions": self.digest,
        }


def recorded(model: OmniModel, data: CalibrationData, progress: Say = lambda _: None) -> Turns:
    """Asks `model` the data's questions and records its greedy answers, at most gate.answers.LONGEST frames of each.

    Questions that cannot be read, and those that this checkpoint cannot be asked, are left out. Raises DataError where
    none is left, UsageError for a checkpoint without a tokenizer.
    """
    import torch

    from .runtimes.torch import TorchEncoder, TorchLanguageModel

    spec = model.spec
    if model.tokenizer_json is None:
        raise UsageError("this checkpoint has no tokenizer, so it cannot be asked anything; leave --calibrate out")
    side, tokenizer = Side(TorchEncoder(model), TorchLanguageModel(model)), Tokenizer(model.tokenizer_json, spec.layout)
    inputs: list[Tensor] = []
    sounds: list[F32] = []
    digest, fault = hashlib.sha256(), ""
    chosen = data.chosen(spec.tasks)
    for i, (sample, task) in enumerate(chosen):
        if i % _TOLD_EVERY == 0:
            progress(f"calibrate: answer question {i + 1} of {len(chosen)}")
        try:
            question = question_of(sample, task, spec.front_end.sample_rate)
            question.check(spec, tokenizer)
            with _read_by_the_body(model) as pieces:
                walk(side, spec, tokenizer, question, None)
        except EdgeOmniError as exc:
            fault = f" ({exc})"
            continue
        inputs.append(torch.cat(pieces, dim=1)[0])
        sounds += [question.audio] if isinstance(question.audio, np.ndarray) else []
        _note(digest, question)
    if not inputs:
        raise DataError(f"no question of the data that is to calibrate the export can be asked{fault}; give other data")
    return Turns(sounds, inputs, digest.hexdigest())


@contextmanager
def calibrating(model: OmniModel, turns: Turns | None, progress: Say) -> Iterator[None]:
    """Within the context exports of `model` take the codes that `turns` choose, and measure ranges on them.

    Without turns codes are those nearest, and ranges are measured on what the exporter makes up.
    """
    if turns is None:
        yield
        return
    from .quantize.calibrate import choosing

    before, model.recorded = model.recorded, turns
    try:
        with choosing(model, turns.inputs, progress):
            yield
    finally:
        model.recorded = before


@contextmanager
def _read_by_the_body(model: OmniModel) -> Iterator[list[Tensor]]:
    """Within the context, what goes into the body's first block [1, T, D] is kept, piece by piece."""
    pieces: list[Tensor] = []
    handle = model.body.layers[0].register_forward_pre_hook(lambda _, args: pieces.append(args[0].clone()))
    try:
        yield pieces
    finally:
        handle.remove()


def _note(digest: Any, question: Question) -> None:
    spoken = b"" if question.audio is None else np.ascontiguousarray(question.audio, np.float32).tobytes()
    told = [question.task, question.text, [list(pair) for pair in question.history], question.system, len(spoken)]
    digest.update(json.dumps(told).encode() + b"\n" + spoken)
