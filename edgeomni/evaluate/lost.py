"""What an export lost, in words: points of each figure against the fp32 original, for the gate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..data.sample import Sample
from ..errors import EdgeOmniError, UsageError
from ..question import Question
from ..session import Session
from ..spec import AUDIO_IN, Task
from . import metrics
from .comparison import compare
from .recognisers import Hearings, Recogniser
from .result import Evaluation, Unusable
from .run import MAX_BAD, Asking, evaluate
from .selection import sentences

Say = Callable[[str], None]
OF_A_TASK = 6
"""Questions of each task along whose answers the gate compares every choice."""


@dataclass(frozen=True)
class JudgeData:
    """A test set by which an export is judged; the fields mean what they mean for `evaluate`.

    Raises UsageError for a test set without samples, and EngineError, UsageError or DataError for a recogniser that is
    missing or can make nothing of the answers: that is told before anything is exported.
    """

    samples: Sequence[Sample]
    tasks: Collection[Task] | None = None
    recogniser: Recogniser | Hearings | str | None = None
    limit: int | None = None
    max_bad: int = MAX_BAD
    unreadable: Sequence[Unusable] = ()
    seed: int = 0
    asking: Asking | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise UsageError("the test set that is to judge the export holds no samples; give one that does")
        answers = sentences(self.samples)
        if isinstance(self.recogniser, str):  # one for both sides, which hears what both say alike once
            object.__setattr__(self, "recogniser", Hearings(self.recogniser, answers) if answers else None)
        if isinstance(self.recogniser, Hearings):
            self.recogniser.check()
        metrics.check_jiwer()

    def questions(self, rate: int, count: int = OF_A_TASK) -> list[Question]:
        """The first `count` questions of every task, spoken ones as samples at `rate` Hz. What cannot be read is left
        out: `evaluate` tells of it.
        """
        found: dict[Task, list[Question]] = {}
        for sample in self.samples:
            for task in sample.tasks():
                if task in AUDIO_IN and not sample.audio:
                    continue
                if (self.tasks is None or task in self.tasks) and len(asked := found.setdefault(task, [])) < count:
                    with suppress(EdgeOmniError):
                        asked.append(question_of(sample, task, rate))
        return [question for asked in found.values() for question in asked]


def question_of(sample: Sample, task: Task, rate: int) -> Question:
    """The sample's question as `task` asks it, its sound at `rate` Hz. Raises AudioError for sound that is none."""
    spoken = task in AUDIO_IN
    return Question(
        task,
        audio=sample.sound(rate) if spoken else None,
        text=None if spoken else sample.text,
        history=sample.history,
        system=sample.system,
    )


def points_lost(
    original: Session, exported: Session, data: JudgeData, progress: Say
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figure ("aa.exact", "asr.wer") -> points that the export lost, and what stands behind them.

    Both answer greedily, and the points are of the samples that both could use. Raises what `evaluate` and `compare`
    raise.
    """
    both = []
    for name, session in (("original", original), ("export", exported)):
        progress(f"evaluate the {name}")
        how: dict[str, Any] = {
            k: getattr(data, k) for k in ("tasks", "recogniser", "limit", "max_bad", "unreadable", "seed", "asking")
        }
        both.append(evaluate(session, data.samples, name=name, **how))
    comparison = compare(both[0], both[1], seed=data.seed)
    lost = {f"{d.task}.{d.metric}": d.points_lost for d in comparison.differences}
    details = {**comparison.to_dict(), "evaluations": [_facts(evaluation) for evaluation in both]}
    return lost, details


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    """What bundle.json keeps of an evaluation: all but the times, so that exporting again gives the same file."""
    facts = evaluation.to_dict()
    for task in facts["tasks"].values():
        del task["timings"]
    return facts
