"""What is to be spoken, decided before anything is: every split's questions, voices, speeds and recordings.

The plan depends on recipe, language, text and seed alone. Held-out splits are compared with the split "train" here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from ..errors import DataError, UsageError
from . import espeak
from .recipe import LANGUAGE, TRAIN, QuestionVoice, Recipe, Recording, Split
from .slots import fill
from .synth_questions import Arguments, Question, written_out
from .synth_speech import Speech

_T = TypeVar("_T")


@dataclass(frozen=True)
class Planned:
    """One sample: a question, and its recording."""

    question: Question
    speech: Speech


Plan = dict[str, list[Planned]]
"""Split -> its samples."""


@dataclass(frozen=True)
class Pools:
    """Voices of questions that training hears, and those that it never does."""

    seen: list[str]
    unseen: list[str]


def language_of(recipe: Recipe, wanted: str | None) -> str:
    """The language to speak: the wanted one, or the first that the recipe is written for.

    A recipe for "en" is one for "en-gb" and other dialects too. Raises UsageError where the two do not fit.
    """
    if wanted is None:
        if not recipe.languages:
            raise UsageError(f"recipe {recipe.name} is for any language; choose one: --language es, for instance")
        return recipe.languages[0]
    espeak.check_voice(wanted)
    if recipe.languages and not any(wanted == code or wanted.startswith(f"{code}-") for code in recipe.languages):
        raise UsageError(f"recipe {recipe.name} is written for {', '.join(recipe.languages)}, not for {wanted!r}")
    return wanted


def planned(
    recipe: Recipe, language: str, *, lines: Sequence[Arguments] = (), seed: int = 0, samples: int | None = None
) -> Plan:
    """The samples of every split.

    `samples`: of "train", and at most as many of every other split [default: the recipe's numbers]. Raises DataError
    where a split has nothing to take from, or shares with "train" what it should not, and UsageError for voices that
    espeak-ng does not have.
    """
    pools = pools_of(recipe.question_voice, language, recipe.name)
    questions = written_out(recipe, lines)
    plan: Plan = {}
    for name, split in recipe.splits.items():
        count = split.samples if samples is None else samples if name == TRAIN else min(samples, split.samples)
        rng = random.Random(f"{seed} {name}")
        asked = _drawn_questions(recipe, split, name, questions, count, rng)
        voices = _endless(pools.unseen if "voices" in split.new else pools.seen, rng)
        recording = split.recording or recipe.recording
        speeches = (_speech(q, next(voices), recipe.question_voice, split, recording, rng) for q in asked)
        plan[name] = [Planned(question, speech) for question, speech in zip(asked, speeches, strict=True)]
    check_disjoint(plan, recipe)
    return plan


def pools_of(asking: QuestionVoice, language: str, name: str) -> Pools:
    """The voices that ask in `language`. Raises UsageError for unknown voices, DataError where none is left."""
    listed, unseen, never = (
        [voice for pattern in patterns for voice in _matching(fill(pattern, {LANGUAGE: language}))]
        for patterns in (asking.voices, asking.unseen, asking.never)
    )
    out = {*unseen, *never}
    pools = Pools(
        [voice for voice in dict.fromkeys(listed) if voice not in out],
        [voice for voice in dict.fromkeys(unseen) if voice not in never],
    )
    if not pools.seen or (asking.unseen and not pools.unseen):
        raise DataError(f"recipe {name}: no voice is left for {'held-out' if pools.seen else 'training'} questions")
    return pools


def check_disjoint(plan: Plan, recipe: Recipe) -> None:
    """Raises DataError, with an example, where a split shares with "train" what the recipe calls new in it."""
    for name, split in recipe.splits.items():
        for kind in split.new:
            if both := _KINDS[kind](plan[name]) & _KINDS[kind](plan[TRAIN]):
                shown = ", ".join(min(both))
                raise DataError(f"recipe {recipe.name}: split {name} shares {kind} with {TRAIN}: {shown}; change one")


def _voices(samples: list[Planned]) -> set[tuple[str, ...]]:
    return {(sample.speech.voice,) for sample in samples}


def _wordings(samples: list[Planned]) -> set[tuple[str, ...]]:
    return {(sample.question.topic, sample.question.wording) for sample in samples}


def _arguments(samples: list[Planned]) -> set[tuple[str, ...]]:
    return {(sample.question.topic, *sample.question.arguments) for sample in samples}


_KINDS = {"voices": _voices, "wordings": _wordings, "arguments": _arguments}


def _drawn_questions(
    recipe: Recipe, split: Split, name: str, questions: list[Question], count: int, rng: random.Random
) -> list[Question]:
    """`count` questions of a split: topics by their weights, and within a topic each question once before any twice."""
    wanted = ("wordings" in split.new, "arguments" in split.new)
    by_topic: dict[str, list[Question]] = {}
    for question in questions:
        if (question.new_wording, question.new_arguments) == wanted:
            by_topic.setdefault(question.topic, []).append(question)
    if not by_topic:
        raise DataError(f"recipe {recipe.name}: no topic has questions for split {name} (new: {', '.join(split.new)})")
    weights = {topic.name: topic.weight for topic in recipe.topics if topic.name in by_topic}
    decks = {topic: _endless(by_topic[topic], rng) for topic in weights}
    drawn = rng.choices(list(weights), list(weights.values()), k=count)
    return [next(decks[topic]) for topic in drawn]


def _endless(items: Sequence[_T], rng: random.Random) -> Iterator[_T]:
    """The items in random order, again and again: each once before any twice."""
    while True:
        yield from rng.sample(items, len(items))


def _speech(
    question: Question, voice: str, asking: QuestionVoice, split: Split, recording: Recording, rng: random.Random
) -> Speech:
    new = "voices" in split.new
    noisy = rng.random() < recording.noise_share
    return Speech(
        text=question.text,
        voice=voice,
        rate_wpm=rng.randint(*((new and asking.unseen_rate_wpm) or asking.rate_wpm)),
        pitch=rng.randint(*((new and asking.unseen_pitch) or asking.pitch)),
        pitch_range=rng.randint(*asking.pitch_range),
        before_s=rng.uniform(*recording.before_s),
        after_s=rng.uniform(*recording.after_s),
        gain_db=rng.uniform(*recording.gain_db),
        snr_db=rng.uniform(*recording.snr_db) if noisy else None,
        seed=rng.getrandbits(32),
    )


def _matching(pattern: str) -> list[str]:
    """The voices that a pattern means: itself, or with "*" after the "+" all variants that match."""
    language, plus, wanted = pattern.partition("+")
    if "*" not in wanted:
        espeak.check_voice(pattern)
        return [pattern]
    espeak.check_voice(language)
    found = [f"{language}{plus}{variant}" for variant in espeak.variants() if fnmatchcase(variant, wanted)]
    if not found:
        raise UsageError(f"voice {pattern!r}: no variant matches; `edgeomni data synth --list-voices` lists all")
    return found
