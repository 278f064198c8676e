"""`edgeomni demo`, start to end: a question, the answer, a picture of both, and the precisions side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundle import Bundle
from ..data.sample import Sample
from ..errors import EngineError
from ..hardware import check_threads, detect
from ..install_hint import install_command
from ..outputs import new_directory
from ..printing import say, show
from ..session import Session
from ..shipped import found, sample_question
from ..sound_writer import SoundWriter
from . import picture, precisions, question
from .answer import Answer, answered, summary
from .question import Question

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "nano"
OUTPUT = "nano-demo"
QUESTIONS = 12
ABOUT = "demo.json"
"""All figures; --force replaces only folders that have it."""


def demo(
    console: Console,
    wav: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = OUTPUT,
    *,
    questions: int = QUESTIONS,
    seed: int | None = None,
    threads: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Asks the shipped model and measures it; makes the folder `output` and returns what its demo.json holds.

    `wav`: the question [default: one that espeak-ng speaks, or without it the shipped one]. `questions`: how many are
    asked for the table. `seed` chooses them [default: the recipe's]. `threads`: to compute with [default: all cores].
    What this install lacks is left out, and said. The folder holds question.wav, answer.wav, picture.png, demo.json,
    the questions of the table in data/, and the exported bundles; it appears when all is done.

    Raises UsageError where `output` exists and may not be replaced, AudioError for a sound file that cannot be a
    question, BundleError or CheckpointError where the model is missing, and GateError where an export misses the gate.
    """
    with new_directory(output, _objection if force else None) as stage:
        facts = _Demo(console, stage, threads).run(wav, questions, seed)
        (stage / ABOUT).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        made = ", ".join(sorted(path.name + "/" * path.is_dir() for path in stage.iterdir()))
    say(console, f"{Path(output)} holds {made}")
    return facts


class _Demo:
    """Fills the folder `stage`. `lacking`: what was left out, and why."""

    def __init__(self, console: Console, stage: Path, threads: int | None) -> None:
        check_threads(threads)
        self.console, self.stage, self.threads, self.lacking = console, stage, threads, list[str]()
        self.bundle = Bundle.open(found(MODEL, "bundle", stage))  # nothing in `stage` has the model's name

    def run(self, wav: str | os.PathLike[str] | None, questions: int, seed: int | None) -> dict[str, Any]:
        rate = self.bundle.spec.front_end.sample_rate
        own = question.the_users(wav, rate) if wav is not None else None
        samples = self._samples(questions, seed)
        asked = own or self._asked(samples, rate)
        answer = self._answer(asked)
        self._draw(asked, answer)
        rows = self._rows(samples)
        show(self.console, precisions.table(rows))
        say(self.console, precisions.LEGEND)
        for why in self.lacking:
            say(self.console, f"left out: {why}")
        return self._facts(asked, answer, rows)

    def _samples(self, count: int, seed: int | None) -> Sequence[Sample]:
        """The questions of the table; none where nobody can speak them."""
        try:
            return question.test_questions(self.stage / "data", count, seed)
        except EngineError as exc:
            self.lacking.append(f"what it hears and answers right, which takes spoken questions: {exc}")
            return ()

    def _asked(self, samples: Sequence[Sample], rate: int) -> Question:
        if samples:
            return question.synthesized(samples[0], rate)
        sample = sample_question(MODEL, self.stage)
        assert sample is not None  # as for the bundle, nothing in `stage` has the model's name
        return question.shipped(sample, rate)

    def _answer(self, asked: Question) -> Answer:
        rate = self.bundle.spec.front_end.sample_rate
        with SoundWriter(self.stage / "question.wav", rate) as out:
            out.write(asked.samples)
        said = f'"{asked.text}", ' if asked.text else ""
        say(self.console, f"question:   {said}{len(asked.samples) / rate:.1f} s, {asked.origin}")
        with Session.open(self.bundle, threads=self.threads) as session:
            answer = answered(self.console, session, asked.samples, self.stage / "answer.wav")
        say(self.console, summary(answer))
        return answer

    def _draw(self, asked: Question, answer: Answer) -> None:
        rate, cores = self.bundle.spec.front_end.sample_rate, self.threads or detect().cores
        what = f"{MODEL} ({precisions.NAMES[precisions.SHIPPED]}, {self.bundle.size / 1e6:.0f} MB)"
        title = f"{what} answers a spoken question on {cores} CPU core{'s' * (cores > 1)}"
        parts = picture.Part(asked.samples, rate, answer.heard), picture.Part(answer.samples, answer.rate, answer.text)
        try:
            picture.draw(self.stage / "picture.png", *parts, answer.first_audio_s, title)
        except ModuleNotFoundError:
            self.lacking.append(f"the picture: matplotlib is not installed: {install_command('train')}")

    def _rows(self, samples: Sequence[Sample]) -> list[precisions.Measured]:
        words = None
        if samples:
            words, lacking = precisions.words_of(samples, question.possible_answers())
            self.lacking += lacking
        checkpoint = Path(found(MODEL, "checkpoint", self.stage))
        bundles, lacking = precisions.exported(checkpoint, self.stage, self.threads, self._tell)
        self.lacking += lacking
        rows = []
        for name, bundle in {**bundles, precisions.SHIPPED: self.bundle}.items():
            self._tell(f"measure {precisions.NAMES[name]} ...")
            rows.append(precisions.measured(name, bundle, self.stage / "question.wav", words, self.threads))
        return rows

    def _tell(self, step: str) -> None:
        say(self.console, step)

    def _facts(self, asked: Question, answer: Answer, rows: Sequence[precisions.Measured]) -> dict[str, Any]:
        rate = self.bundle.spec.front_end.sample_rate
        return {
            "edgeomni": __version__,
            "machine": detect().to_dict(),
            "threads": self.threads,
            "question": {"text": asked.text, "origin": asked.origin, "seconds": len(asked.samples) / rate},
            "heard": answer.heard,
            "answer": {"text": answer.text, "ended": answer.end.reason, "timings": answer.end.timings},
            "precisions": {row.precision: row.to_dict() for row in rows},
            "left_out": self.lacking,
        }


def _objection(folder: Path) -> str:
    return "" if (folder / ABOUT).is_file() else f"holds no {ABOUT}, so it is no folder of a demo"
