"""Samples -> batches: what is drawn is decoded, augmented and put into frames when it is wanted.

A sample that cannot be used is told once, with its file and line, and another one of its task takes its place; more of
them than allowed end the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import audio as sound
from ..arrays import F32, I32, I64
from ..data.sample import Sample, check_fits
from ..errors import CheckpointError, DataError, EdgeOmniError
from ..prompts import Prompt, from_texts
from ..question import window_samples
from ..spec import AUDIO_IN, AUDIO_OUT, TASKS, OmniSpec, Task
from ..text import Tokenizer
from .augment import Augmenter
from .batching import Draw
from .frames import IGNORED, Frames, answer_frames, frames_of, padding

logger = logging.getLogger("edgeomni")

Codes = Callable[[F32], I64]
"""Samples [S] at the codec's rate -> codec frames int64 [n, K]."""


@dataclass(frozen=True, eq=False)
class Heard:
    """One recording of a question: the log-mel [n_mels, t] of its encoder window, and the features wanted of it."""

    mel: F32
    features: int


@dataclass(frozen=True, eq=False)
class Item:
    """One draw, ready for a batch. `transcript`: what is said in the question, "" where that is not known."""

    task: Task
    frames: Frames
    heard: Sequence[Heard]
    transcript: str


@dataclass
class BadSamples:
    """Samples that cannot be used. Raises DataError when there are more than `most`."""

    most: int
    _known: set[int] = field(default_factory=set)
    """By identity: samples made in a program may all have the same `where`."""

    def __contains__(self, sample: Sample) -> bool:
        return id(sample) in self._known

    def add(self, sample: Sample, exc: Exception) -> None:
        if sample in self:
            return
        self._known.add(id(sample))
        logger.warning("%s is left out: %s", sample.where, exc)
        if len(self._known) > self.most:
            raise DataError(
                f"{len(self._known)} samples cannot be used, more than data.max_bad allows ({self.most}); the last "
                f"one: {sample.where}: {exc}. `edgeomni data check` lists them all"
            ) from exc


class Reader:
    """Makes an Item of a sample and a task. Caches the codec frames of answers, which many samples may share."""

    def __init__(self, spec: OmniSpec, tokenizer: Tokenizer, codes: Codes, augmenter: Augmenter | None = None) -> None:
        self.spec, self._tokenizer, self._codes, self._augmenter = spec, tokenizer, codes, augmenter
        self._known: dict[tuple[str, float, float | None], I64] = {}

    def length(self, sample: Sample, task: Task) -> int:
        """LLM frames of prompt and answer, as far as the recordings' headers tell.

        Raises DataError, AudioError or PromptError for a sample that cannot serve the task.
        """
        if missing := sample.missing(task):
            raise DataError(f"task {task} needs {' and '.join(missing)}")
        features = self._estimated_features(sample) if task in AUDIO_IN else 0
        text = len(self._answer_ids(sample, task))
        codes = self._estimated_codes(sample) if task in AUDIO_OUT else 0
        frames = self._prompt(sample, task, features).length - 1 + answer_frames(self.spec.layout, task, text, codes)
        if frames > self.spec.context:
            raise DataError(f"{frames} frames of prompt and answer exceed the model's context of {self.spec.context}")
        return frames

    def item(self, sample: Sample, task: Task, seed: int | None = None) -> Item:
        """The sample as that task. `seed` None: without augmentation. Raises DataError, AudioError or PromptError."""
        written, answer = self._written(sample, task, seed), self._answer_ids(sample, task)
        if written is not None and task == "asr":  # may be edited: the answer is what is written
            answer = [i for i in written.tolist() if i != self.spec.layout.pad_t]
        heard = self._heard(sample, seed) if task in AUDIO_IN and written is None else []
        count = sum(h.features for h in heard) if written is None else len(written)
        prompt = self._prompt(sample, task, count)
        if written is not None:
            prompt.ids[0, -1, prompt.feature_start : prompt.feature_start + count] = written
        codes = self._answer_codes(sample) if task in AUDIO_OUT else None
        frames = frames_of(self.spec.layout, task, prompt, answer, codes)
        if frames.length > self.spec.context:
            raise DataError(f"{frames.length} frames exceed the model's context of {self.spec.context}")
        if self._augmenter is not None and seed is not None:
            frames = replace(frames, ids=self._augmenter.codes(frames.ids, self.spec.layout, seed))
        return Item(task, frames, heard, sample.text if heard else "")

    def _prompt(self, sample: Sample, task: Task, features: int) -> Prompt:
        return from_texts(
            self.spec,
            self._tokenizer,
            task,
            features=features,
            text=None if task in AUDIO_IN else sample.text,
            system=sample.system,
            history=sample.history,
        )

    def _written(self, sample: Sample, task: Task, seed: int | None) -> I32 | None:
        """The text ids that take the recording's place, where the augmentation wants it and they fit."""
        if task not in AUDIO_IN or self._augmenter is None or seed is None or not sample.text.strip():
            return None
        codes = len(self._answer_codes(sample)) if task in AUDIO_OUT else 0
        answer = answer_frames(self.spec.layout, task, len(self._answer_ids(sample, task)), codes)
        room = self.spec.context - answer - (self._prompt(sample, task, 1).length - 2)
        said = self._tokenizer.encode(sample.text)
        if task == "asr":
            said = self._augmenter.edited(said, self.spec.layout, seed)
        return self._augmenter.written(said, self.spec.layout, seed, min(room, self.spec.encoder.context))

    def _answer_ids(self, sample: Sample, task: Task) -> list[int]:
        return self._tokenizer.encode(sample.answer_text(task))

    def _estimated_features(self, sample: Sample) -> int:
        if sample.mel is not None:
            return sum(sample.mel.features)
        front, seconds = self.spec.front_end, sum(clip.info().seconds for clip in sample.audio)
        check_fits(", ".join(clip.name for clip in sample.audio), seconds, front.window_s)
        return sound.feature_count(round(seconds * front.sample_rate), front)

    def _estimated_codes(self, sample: Sample) -> int:
        if sample.answer_codes is not None:
            return len(sample.answer_codes)
        assert sample.answer_audio is not None
        codec = self.spec.codec
        return max(1, -(-round(sample.answer_audio.info().seconds * codec.sample_rate) // codec.frame_samples))

    def _answer_codes(self, sample: Sample) -> I64:
        if sample.answer_codes is not None:
            return sample.answer_codes
        clip = sample.answer_audio
        if clip is None:
            raise DataError("the answer has neither answer_audio nor answer_codes")
        key = (clip.name, clip.start_s, clip.end_s)
        if key not in self._known:
            self._known[key] = self._codes(clip.read(self.spec.codec.sample_rate))
        return self._known[key]

    def _heard(self, sample: Sample, seed: int | None) -> list[Heard]:
        """The question's sound, encoded as serving encodes it. `seed` None: without augmentation."""
        if sample.mel is not None:
            pairs = zip(sample.mel.windows(), sample.mel.features, strict=True)
            return [self._masked(mel, features, seed) for mel, features in pairs]
        front = self.spec.front_end
        samples = sample.sound(front.sample_rate, front.window_s)
        if self._augmenter is not None and seed is not None:
            longest = front.window_s * front.sample_rate  # slower speech may no longer fit
            samples = self._augmenter.samples(samples, front.sample_rate, seed, longest)
        window = window_samples(None, len(samples), self.spec)
        mel = sound.log_mel(samples, front, window // front.hop)
        return [self._masked(mel, sound.feature_count(len(samples), front), seed)]

    def _masked(self, mel: F32, features: int, seed: int | None) -> Heard:
        features = min(features, mel.shape[1] // 2)
        if self._augmenter is not None and seed is not None:
            mel = self._augmenter.mel(mel, 2 * features, seed)
        return Heard(mel, features)


@dataclass(frozen=True, eq=False)
class Usable:
    """Samples sorted by the tasks that they serve: task -> indices, and the LLM frames of each."""

    samples: Sequence[Sample]
    members: Mapping[Task, Sequence[int]]
    lengths: Mapping[Task, Sequence[int]]


def usable(samples: Sequence[Sample], tasks: Sequence[Task], reader: Reader, bad: BadSamples) -> Usable:
    """Finds what each sample can serve, from texts and headers alone; one warning tells how many serve nothing.

    Raises DataError for too many bad samples.
    """
    idle = 0
    members: dict[Task, list[int]] = {task: [] for task in tasks}
    lengths: dict[Task, list[int]] = {task: [] for task in tasks}
    for index, sample in enumerate(samples):
        try:
            found = [(task, reader.length(sample, task)) for task in sample.tasks() if task in members]
        except CheckpointError:  # no tokenizer: no sample could be used
            raise
        except EdgeOmniError as exc:
            bad.add(sample, exc)
            continue
        idle += not found
        for task, length in found:
            members[task].append(index)
            lengths[task].append(length)
    if idle:
        logger.warning("%d of %d samples serve none of the tasks %s", idle, len(samples), ", ".join(tasks))
    return Usable(samples, members, lengths)


class Collator:
    """A list of draws -> the tensors of one batch. It is torch's `collate_fn`, over draws that stand for themselves."""

    def __init__(self, data: Usable, reader: Reader, bad: BadSamples, seed: int | None = None) -> None:
        self._data, self._reader, self._bad, self._seed = data, reader, bad, seed
        self._places = {task: {index: i for i, index in enumerate(found)} for task, found in data.members.items()}

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        return collate(self._reader.spec, [self._item(draw) for draw in draws])

    def _item(self, draw: Draw) -> Item:
        """The drawn sample's, or that of the next one of its task that can be used."""
        members = self._data.members[draw.task]
        first = self._places[draw.task][draw.index]
        for index in (*members[first:], *members[:first]):
            sample = self._data.samples[index]
            if sample in self._bad:
                continue
            try:
                return self._reader.item(sample, draw.task, self._seed_of(draw))
            except EdgeOmniError as exc:
                self._bad.add(sample, exc)
        raise DataError(f"no sample of task {draw.task} can be used; `edgeomni data check` says why")

    def _seed_of(self, draw: Draw) -> int | None:
        return None if self._seed is None else self._seed * 1_000_003 + draw.number


def collate(spec: OmniSpec, items: Sequence[Item]) -> dict[str, Any]:
    """Items -> one batch, padded behind each sequence.

    `ids`, `labels` int64 [B, K+1, T], `tasks` int64 [B] (positions in TASKS), `mels`: groups of recordings whose
    windows are equally long (see `_group`), `transcripts` list[str] [B].
    """
    longest = max(item.frames.length for item in items)
    ids = np.tile(padding(spec.layout), (len(items), 1, longest)).astype(np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, item in enumerate(items):
        ids[row, :, : item.frames.length] = item.frames.ids
        labels[row, :, : item.frames.length] = item.frames.labels
    return {
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "tasks": torch.tensor([TASKS.index(item.task) for item in items]),
        "mels": _groups(items),
        "transcripts": [item.transcript for item in items],
    }


def _groups(items: Sequence[Item]) -> list[dict[str, Tensor]]:
    """Recordings by the length of their window, so that each is encoded as serving encodes it, without masks.

    Of each group `mel` float32 [n, n_mels, t], and int64 [n] each: `row` in the batch, `start` position of its first
    feature, `count` of its features.
    """
    by_length: dict[int, list[tuple[F32, int, int, int]]] = {}
    for row, item in enumerate(items):
        start = item.frames.feature_start
        for heard in item.heard:
            by_length.setdefault(heard.mel.shape[1], []).append((heard.mel, row, start, heard.features))
            start += heard.features
    return [_group(members) for _, members in sorted(by_length.items())]


def _group(members: Sequence[tuple[F32, int, int, int]]) -> dict[str, Tensor]:
    mels, rows, starts, counts = zip(*members, strict=True)
    return {
        "mel": torch.from_numpy(np.stack(mels)),
        "row": torch.tensor(rows),
        "start": torch.tensor(starts),
        "count": torch.tensor(counts),
    }
