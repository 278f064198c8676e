"""`edgeomni data synth`: training and test data spoken by espeak-ng, after a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from ..audio import check_rate
from ..errors import UsageError
from ..hardware import check_threads
from ..outputs import check_directory, new_directory
from ..spec import AUDIO_IN, AUDIO_OUT
from .native import write_jsonl
from .recipe import LANGUAGE, Recipe
from .recipe_files import parse_recipe, recipe_bytes
from .sample import Clip, Sample
from .slots import fill
from .synth_plan import Plan, Planned, language_of, planned
from .synth_questions import Arguments, read_lines
from .synth_speech import Job, Progress, Speech, recorded

FORMATS = ("wav", "flac")
"""Sound formats, both 16 bit and without loss; FLAC takes about half the space."""
ABOUT = "synth.json"
"""What a folder of synthesized data says about itself; --force replaces only folders that have it."""


def synthesize(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    language: str | None = None,
    samples: int | None = None,
    seed: int | None = None,
    workers: int = 1,
    rate: int = 16_000,
    text: str | os.PathLike[str] | None = None,
    format: str = "wav",
    force: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Path:
    """Makes the folder `out` of speech and JSON Lines, one file for each split of `recipe`, and returns its path.

    `recipe`: the name of a shipped one, or the path of a .toml file. `language`: an espeak-ng code [default: the
    recipe's first]. `samples`: of "train", and at most as many of any other split. `seed` chooses the questions, voices
    and noise [default: the recipe's]; what is held out does not depend on it. `rate` in Hz. `text`: the file of
    sentences for recipes that speak one. `progress` is told how many recordings of how many are made.

    The same arguments give the same bytes, with any number of `workers` (processes). The folder appears when it is
    whole; an hour of speech takes about half a minute, so there is nothing to resume. More than one worker needs the
    caller's main module to be importable without side effects, as Python's multiprocessing does.

    Raises UsageError for arguments that make no sense, DataError for a recipe or text that cannot be used, and
    EngineError where espeak-ng is missing; then nothing is left behind.
    """
    check_rate(rate, "speech")
    check_threads(workers)
    if format not in FORMATS:
        raise UsageError(f"unknown sound format {format!r}; known are {', '.join(FORMATS)}")
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be 1 or more, not {samples}")
    objection = _objection if force else None
    check_directory(out, objection)
    raw, where = recipe_bytes(os.fspath(recipe))
    read = parse_recipe(raw, where)
    spoken = language_of(read, language)
    used_seed = read.seed if seed is None else seed
    plan = planned(read, spoken, lines=_lines(read, text), seed=used_seed, samples=samples)
    with new_directory(out, objection) as stage:
        writer = _Writer(stage, read, spoken, rate, format)
        writer.record(plan, workers, progress)
        writer.describe(plan, raw, used_seed)
    return Path(out)


class _Writer:
    """Fills the folder `stage`: audio/<split>/, answers/, <split>.jsonl, the recipe, and what was asked for."""

    def __init__(self, stage: Path, recipe: Recipe, language: str, rate: int, format: str) -> None:
        self.stage, self.recipe, self.language, self.rate, self.format = stage, recipe, language, rate, format
        self.asks_aloud = bool(AUDIO_IN & set(recipe.tasks))
        self.answers_aloud = bool(AUDIO_OUT & set(recipe.tasks))
        self.answer_voice = fill(recipe.answer_voice.voice, {LANGUAGE: language})

    def record(self, plan: Plan, workers: int, progress: Progress) -> None:
        """Makes every recording, and the JSON Lines of every split."""
        answers = self._answer_files(plan)
        jobs = [Job(path, self._answer_speech(text), self.rate) for text, path in answers.items()]
        questions = {split: self._question_files(split, len(samples)) for split, samples in plan.items()}
        for split, paths in questions.items():
            jobs += [Job(path, plan[split][index].speech, self.rate) for index, path in enumerate(paths)]
        for folder in {job.path.parent for job in jobs}:
            folder.mkdir(parents=True)
        for done in recorded(jobs, workers):
            progress(done, len(jobs))
        for split, samples in plan.items():
            write_jsonl(self._samples(samples, questions[split], answers), self.stage / f"{split}.jsonl")

    def describe(self, plan: Plan, recipe: bytes, seed: int) -> None:
        """The recipe as it was given, and everything else that is needed to make the same data again."""
        (self.stage / "recipe.toml").write_bytes(recipe)
        about = {
            "espeakng-loader": metadata.version("espeakng-loader"),
            "recipe": self.recipe.name,
            "language": self.language,
            "seed": seed,
            "rate": self.rate,
            "format": self.format,
            "answer_voice": self.answer_voice,
            "splits": {name: _figures(samples) for name, samples in plan.items()},
        }
        (self.stage / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def _answer_files(self, plan: Plan) -> dict[str, Path]:
        """Answer -> its one recording, which all samples share."""
        if not self.answers_aloud:
            return {}
        texts = sorted({sample.question.answer for samples in plan.values() for sample in samples})
        return dict(zip(texts, self._paths("answers", len(texts)), strict=True))

    def _question_files(self, split: str, count: int) -> list[Path]:
        return self._paths(f"audio/{split}", count) if self.asks_aloud else []

    def _paths(self, folder: str, count: int) -> list[Path]:
        digits = max(4, len(str(count)))
        return [self.stage / folder / f"{index:0{digits}}.{self.format}" for index in range(count)]

    def _answer_speech(self, text: str) -> Speech:
        how = self.recipe.answer_voice
        return Speech(text, self.answer_voice, how.rate_wpm, how.pitch, how.pitch_range, how.before_s, how.after_s)

    def _samples(self, samples: Sequence[Planned], files: list[Path], answers: dict[str, Path]) -> Iterator[Sample]:
        """One for each planned sample; where its fields allow more tasks than the recipe wants, one for each task."""
        for index, sample in enumerate(samples):
            question, answer_file = sample.question, answers.get(sample.question.answer)
            whole = Sample(
                where="",
                audio=(Clip.of(files[index]),) if files else (),
                text=question.text,
                answer=question.answer,
                answer_audio=Clip.of(answer_file) if answer_file else None,
                system=self.recipe.system,
                language=self.language,
                speaker=sample.speech.voice if files else "",
            )
            wanted = self.recipe.tasks
            yield from [whole] if set(whole.tasks()) == set(wanted) else [replace(whole, task=task) for task in wanted]


def _figures(samples: Sequence[Planned]) -> dict[str, int]:
    return {
        "samples": len(samples),
        "questions": len({sample.question.text for sample in samples}),
        "answers": len({sample.question.answer for sample in samples}),
        "voices": len({sample.speech.voice for sample in samples}),
    }


def _lines(recipe: Recipe, text: str | os.PathLike[str] | None) -> list[Arguments]:
    """The sentences of the text file. Raises UsageError where the recipe needs one and has none, or the reverse."""
    if recipe.needs_text and text is None:
        raise UsageError(f"recipe {recipe.name} speaks the lines of a text file; give one: --text FILE")
    if text is not None and not recipe.needs_text:
        raise UsageError(f"recipe {recipe.name} has its own sentences; leave --text out, or take the recipe repeat")
    return [] if text is None else read_lines(text)


def _objection(path: Path) -> str:
    return "" if (path / ABOUT).is_file() else f"holds no {ABOUT}, so it is no synthesized data"
