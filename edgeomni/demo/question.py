"""What the demo asks: one question to be shown, and a few more by which the precisions are measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arrays import F32
from ..audio import read
from ..data.readers import read_data
from ..data.recipe_files import load_recipe
from ..data.sample import Sample
from ..data.synth import synthesize
from ..data.synth_questions import written_out
from ..shipped import SampleQuestion

RECIPE, SPLIT = "nano", "test"
"""The recipe that nano learnt from, and the split whose voices and wordings training never had."""


@dataclass(frozen=True, eq=False)
class Question:
    """A spoken question: samples float32 [S] at the front end's rate; what is said in it ("" unknown); where from."""

    samples: F32
    text: str
    origin: str


def test_questions(folder: Path, count: int, seed: int | None) -> Sequence[Sample]:
    """At most `count` spoken questions with their spoken answers, made in the new folder `folder` by espeak-ng.

    `seed` chooses them [default: the recipe's]. Raises EngineError where espeak-ng is missing.
    """
    made = synthesize(RECIPE, folder, samples=count, seed=seed)
    return read_data(str(made / f"{SPLIT}.jsonl")).samples


def possible_answers() -> list[str]:
    """Every answer that the recipe knows: what a recogniser with a grammar has to tell apart."""
    return sorted({question.answer for question in written_out(load_recipe(RECIPE), [])})


def the_users(path: str | os.PathLike[str], rate: int) -> Question:
    """A sound file of the user's, at `rate` Hz. Raises AudioError where it cannot be a question."""
    return Question(read(path, rate), "", "yours")


def synthesized(sample: Sample, rate: int) -> Question:
    """The question of a sample of `test_questions`, at `rate` Hz."""
    return Question(sample.sound(rate), sample.text, f"spoken by espeak-ng's voice {sample.speaker}")


def shipped(sample: SampleQuestion, rate: int) -> Question:
    """The sample question of the shipped model, at `rate` Hz."""
    return Question(read(sample.path, rate), sample.text, "the sample question that EdgeOmni brings")
