"""Asks a source every sample of a test set, and scores what it writes and says."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import F32, I64
from ..bundle import Bundle
from ..data.sample import Sample
from ..engines import Device, EngineChoice
from ..errors import AudioError, DataError, PromptError
from ..overlap import OverlapChoice
from ..sampling import Sampling, check_seed
from ..session import AudioChunk, Session, TextDelta
from ..spec import AUDIO_IN, AUDIO_OUT, Task
from ..tokens import frames_to_codes
from . import metrics
from .recognisers import RATE, Hearings, PocketSphinx, Recogniser
from .result import Evaluation, Row, Unusable
from .selection import chosen_samples, note, sentences, told

Progress = Callable[[str, int, int], None]
"""Told the task, how many of its samples are done, and how many it has."""
MAX_BAD = 10
MAX_SECONDS = 30.0
"""Sound of an answer at most: a model that does not end its answer would fill its whole context."""


@dataclass(frozen=True)
class Asking:
    """How answers are asked for. `max_length`: LLM frames with the prompt, None for the checkpoint's context."""

    sampling: Sampling = Sampling(greedy=True)
    max_seconds: float = MAX_SECONDS
    max_length: int | None = None


def evaluate(
    source: Session | Bundle | str | os.PathLike[str],
    samples: Sequence[Sample],
    *,
    tasks: Collection[Task] | None = None,
    recogniser: Recogniser | Hearings | str | None = None,
    limit: int | None = None,
    max_bad: int = MAX_BAD,
    unreadable: Sequence[Unusable] = (),
    seed: int = 0,
    asking: Asking | None = None,
    threads: int | None = None,
    device: Device | None = None,
    engine: EngineChoice = None,
    overlap: OverlapChoice = "auto",
    strict: bool = False,
    name: str | None = None,
    progress: Progress = lambda task, done, total: None,
) -> Evaluation:
    """Evaluates a checkpoint or bundle, or a Session that is open already (which the caller closes), on `samples`.

    `tasks` None: those that the samples have. A sample without a spoken reference takes part in aa and ta where they
    are asked for by name; it then has no ceiling. `recogniser`: one of its own, Hearings to share what was heard, or a
    name for `recogniser_of`; without one, the sound of aa and ta is not judged. `limit`: samples of each task at most.
    `max_bad`: samples that may be unusable; each is told in the result, with those that were `unreadable` before, which
    count. `seed`: of the shuffled references. `threads`, `device`, `engine`, `overlap` and `strict` are
    Session.open's.
    `name` is what the result calls the source.

    Raises UsageError for tasks that the checkpoint does not have, DataError where more than `max_bad` samples or all
    of them cannot be used, EngineError where jiwer or the recogniser is missing or fails, and what Session.open raises.
    """
    check_seed(seed)
    how: dict[str, Any] = {"threads": threads, "device": device, "engine": engine, "overlap": overlap, "strict": strict}
    with _opened(source, how) as session:
        chosen, unfit = chosen_samples(samples, tasks, session.spec, limit)
        unusable = [*unreadable, *unfit]
        hearings = _hearings(recogniser, samples, chosen)
        if "asr" in chosen or hearings:
            metrics.check_jiwer()
        examiner = _Examiner(session, samples, hearings, asking or Asking(), unusable, max_bad)
        rows = [row for task in chosen for row in _shuffled(examiner.task(task, chosen[task], progress), seed)]
    if not rows:
        raise DataError(f"no sample could be used; {told(unusable)}")
    shown = name or ("session" if isinstance(source, Session) else str(getattr(source, "path", source)))
    heard = hearings.recogniser if hearings else None
    left_out = heard.left_out if isinstance(heard, PocketSphinx) else {}
    return Evaluation(shown, tuple(rows), tuple(unusable), heard.name if heard else "", left_out)


def _hearings(
    recogniser: Recogniser | Hearings | str | None, samples: Sequence[Sample], chosen: Collection[Task]
) -> Hearings | None:
    """What hears the answers; None where nobody does, or nothing is spoken."""
    if recogniser is None or not AUDIO_OUT & set(chosen):
        return None
    hearings = recogniser if isinstance(recogniser, Hearings) else Hearings(recogniser, sentences(samples))
    hearings.check()
    return hearings


@contextmanager
def _opened(source: Session | Bundle | str | os.PathLike[str], how: dict[str, Any]) -> Iterator[Session]:
    if isinstance(source, Session):
        yield source
        return
    with Session.open(source, **how) as session:
        yield session


@dataclass
class _Examiner:
    """Asks one session. Samples that cannot be used go to `unusable`, with their reason."""

    session: Session
    samples: Sequence[Sample]
    hearings: Hearings | None
    asking: Asking
    unusable: list[Unusable]
    max_bad: int

    def task(self, task: Task, places: Sequence[int], progress: Progress) -> list[Row]:
        rows = []
        self._check_bad()
        for done, index in enumerate(places):
            progress(task, done, len(places))
            try:
                rows.append(self._row(task, index))
            except (AudioError, DataError, PromptError) as exc:
                note(self.unusable, Unusable(self.samples[index].where, task, str(exc)))
                self._check_bad()
        progress(task, len(places), len(places))
        return rows

    def _check_bad(self) -> None:
        bad = len({entry.where for entry in self.unusable})
        if bad > self.max_bad:
            raise DataError(
                f"{bad} sample(s) cannot be used, and at most {self.max_bad} may be; {told(self.unusable)}. "
                "Mend or remove them (`edgeomni data check` lists them all), or allow more with --max-bad"
            )

    def _row(self, task: Task, index: int) -> Row:
        sample, spoken = self.samples[index], task in AUDIO_OUT and self.hearings is not None
        reference = sample.answer_text(task)
        if not metrics.normalised(reference):
            raise DataError(f"its reference {reference!r:.40} holds no words to judge an answer by")
        question = self._question(task, sample)
        heard_reference = self._heard_reference(sample) if spoken else None
        text, sound, ended, timings = self._answer(task, sample, question)
        heard = self._hear(sound, self.session.spec.codec.sample_rate) if spoken else None
        scores = metrics.written(task, reference, text)
        if heard is not None:
            scores |= metrics.spoken("heard", reference, heard)
        if heard_reference is not None:
            scores |= metrics.spoken("ceiling", reference, heard_reference)
        where = sample.where
        return Row(index, task, where, reference, text, heard, heard_reference, None, ended, scores, timings)

    def _question(self, task: Task, sample: Sample) -> F32 | None:
        """Samples [S] of a spoken question at the front end's rate; several recordings follow one another."""
        if task not in AUDIO_IN:
            return None
        if not sample.audio:
            raise DataError("it holds a prepared log-mel and no recording; evaluate the data it was prepared from")
        return sample.sound(self.session.spec.front_end.sample_rate)

    def _answer(self, task: Task, sample: Sample, question: F32 | None) -> tuple[str, F32, str, dict[str, float]]:
        """Text, sound [S], why it ended, timings."""
        turn = self.session.respond(
            task,
            audio=question,
            text=None if task in AUDIO_IN else sample.text,
            system=sample.system,
            history=sample.history,
            sampling=self.asking.sampling,
            max_length=self.asking.max_length,
            max_seconds=self.asking.max_seconds if task in AUDIO_OUT else None,
        )
        chunks = [np.zeros(0, np.float32)]
        for event in turn:
            if isinstance(event, AudioChunk):
                chunks.append(event.samples)
            elif not isinstance(event, TextDelta):
                end = event
        return end.text, np.concatenate(chunks), end.reason, end.timings

    def _heard_reference(self, sample: Sample) -> str | None:
        if sample.answer_audio is not None:
            return self._hear(sample.answer_audio.read(RATE), RATE)
        return None if sample.answer_codes is None else self._hear(*self._decoded(sample.answer_codes))

    def _decoded(self, frames: I64) -> tuple[F32, int]:
        """Codec frames [n, K] -> sound [S] and its rate in Hz, by the codec of the session."""
        codec, decoder = self.session.spec.codec, self.session.components.codec
        wrong = frames.ndim != 2 or frames.shape[1:] != (codec.streams,) or not len(frames)
        if wrong or frames.min() < 0 or frames.max() >= codec.codebook_size:
            raise DataError(
                f"its answer_codes are no frames of this checkpoint's codec ([frames, {codec.streams}], ids under "
                f"{codec.codebook_size}): prepare the data with this checkpoint"
            )
        return decoder.decode(frames_to_codes(frames, codec), decoder.open(), True), codec.sample_rate

    def _hear(self, sound: F32, rate: int) -> str:
        assert self.hearings is not None
        return self.hearings.hear(sound, rate)


def _shuffled(rows: list[Row], seed: int) -> list[Row]:
    """The rows with their floor: each hearing scored by another row's reference."""
    out = list(rows)
    if any(row.heard is None for row in rows):
        return out
    for place, other in enumerate(deranged(len(rows), seed)):
        row, reference = rows[place], rows[other].reference
        floor = metrics.spoken("floor", reference, row.heard or "")
        out[place] = replace(row, shuffled=reference, scores={**row.scores, **floor})
    return out


def deranged(count: int, seed: int) -> list[int]:
    """A permutation of `count` places that leaves none where it was: one cycle through all of them, in random order.

    Empty for fewer than two places, which have no such permutation.
    """
    cycle = np.random.default_rng(seed).permutation(count)
    out = np.empty(count, np.int64)
    out[cycle] = np.roll(cycle, -1)
    return out.tolist() if count > 1 else []
