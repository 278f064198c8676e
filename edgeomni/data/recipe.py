"""Recipes of synthesized data: what is asked and answered, by which voices, and what is held out (docs/data.md).

These are the typed documents; recipe_files.py reads them, recipe_checks.py says which fit together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from ..spec import TASKS, Task

RECIPE_SCHEMA = "1.0"
TRAIN = "train"
LANGUAGE = "language"
"""The slot of voices that stands for the language that is asked for."""
TEXT_COLUMNS = ("question", "answer")
"""What the columns of a --text file are called."""

New = Literal["voices", "wordings", "arguments"]
Some = Annotated[str, Meta(min_length=1, max_length=1000)]
Words = Annotated[list[Some], Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Range = tuple[float, float]
WholeRange = tuple[int, int]


@dataclass(frozen=True)
class Topic:
    """One kind of question.

    Its slots are filled from `each` (argument -> list; every combination that `where` allows) and `then` (word ->
    formula), or from a table (`columns`, `rows`), or from the lines of the --text file (`from_text`).
    `unseen_questions` are wordings for held-out splits; `unseen_arguments` n holds out every n-th combination or row.
    With `unordered`, combinations that differ in order alone are held out together. `weight`: of the topic among all.
    """

    name: Some
    questions: Words
    answer: Some
    unseen_questions: list[Some] = field(default_factory=list)
    each: dict[str, str] = field(default_factory=dict)
    where: str = ""
    then: dict[str, str] = field(default_factory=dict)
    columns: list[Some] = field(default_factory=list)
    rows: list[list[Some]] = field(default_factory=list)
    from_text: bool = False
    unseen_arguments: Annotated[int, Meta(ge=2)] | None = None
    unordered: bool = False
    weight: Annotated[float, Meta(gt=0)] = 1.0


@dataclass(frozen=True)
class QuestionVoice:
    """Who asks. Voices may hold {language}, and "*" in a variant's name for any characters; `never` wins over all.

    What matches `voices` and `unseen` both is unseen. `unseen_rate_wpm` and `unseen_pitch` are the ranges of splits
    with new voices [default: those of all].
    """

    voices: Words
    unseen: list[Some] = field(default_factory=list)
    never: list[Some] = field(default_factory=list)
    rate_wpm: WholeRange = (130, 190)
    pitch: WholeRange = (30, 70)
    pitch_range: WholeRange = (30, 70)
    unseen_rate_wpm: WholeRange | None = None
    unseen_pitch: WholeRange | None = None


@dataclass(frozen=True)
class AnswerVoice:
    """The one voice of all answers, and the silence at either end of their recordings in seconds."""

    voice: Some = "{language}+robosoft"
    rate_wpm: int = 145
    pitch: int = 50
    pitch_range: int = 50
    before_s: float = 0.05
    after_s: float = 0.1


@dataclass(frozen=True)
class Recording:
    """How questions are recorded: silence at either end in seconds, gain in dB, and pink noise.

    `noise_share` of the recordings have noise, at a signal-to-noise ratio in dB within `snr_db`.
    """

    before_s: Range = (0.1, 0.4)
    after_s: Range = (0.1, 0.4)
    gain_db: Range = (-12.0, 0.0)
    noise_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    snr_db: Range = (10.0, 30.0)


@dataclass(frozen=True)
class Split:
    """One output file. `new`: what its samples have that the split "train" never has; the rest is as in training."""

    samples: Count
    new: list[New] = field(default_factory=list)
    recording: Recording | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; the `name` is the file's.

    `languages`: those that it is written for, their dialects included; [] for any. `openings` are put before every
    question, in turn ("" is none). `tasks`: what samples are for. `system`: their system prompt, None for the
    checkpoint's own.
    """

    name: str
    title: str
    topics: Annotated[list[Topic], Meta(min_length=1)]
    question_voice: QuestionVoice
    splits: dict[str, Split]
    answer_voice: AnswerVoice = AnswerVoice()
    recording: Recording = Recording()
    lists: dict[str, Words] = field(default_factory=dict)
    openings: Annotated[list[str], Meta(min_length=1)] = field(default_factory=lambda: [""])
    languages: list[Some] = field(default_factory=list)
    tasks: Annotated[list[Task], Meta(min_length=1)] = field(default_factory=lambda: list(TASKS))
    system: str | None = None
    seed: Annotated[int, Meta(ge=0)] = 0
    schema: str = RECIPE_SCHEMA

    @property
    def needs_text(self) -> bool:
        """Whether a topic takes its questions from a --text file."""
        return any(topic.from_text for topic in self.topics)
