"""One shard of prepared data: samples -> rows of an Arrow file. Workers end with their parent process."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import audio as sound
from ..arrays import I64
from ..data.sample import Clip, Sample
from ..errors import AudioError, DataError, EdgeOmniError
from ..model import codecs
from ..outputs import new_file
from ..question import window_samples
from ..spec import OmniSpec
from .codes import codec_frames

ROWS = 16
"""Rows that are held in memory before they are written."""
_TEXTS = ("where", "task", "text", "answer", "system", "language", "speaker")


@dataclass(frozen=True)
class Held:
    """The bytes of a sound that is no file, or why they cannot be had. Other processes can be given it."""

    data: bytes
    fault: str = ""

    def __call__(self) -> bytes:
        if self.fault:
            raise AudioError(self.fault)
        return self.data


@dataclass(frozen=True)
class Job:
    """One shard: the file to be written, and its samples, whose sounds are files or Held."""

    path: Path
    samples: Sequence[Sample]


def portable(sample: Sample) -> Sample:
    """The sample with the bytes of its sounds at hand, where they are no files."""
    answer = sample.answer_audio
    return replace(
        sample,
        audio=tuple(_held(clip) for clip in sample.audio),
        answer_audio=None if answer is None else _held(answer),
        mel=None,
    )


def fingerprint(samples: Sequence[Sample]) -> str:
    """Hash of all that portable samples hold; of a sound file its path, size and time of change."""
    whole = hashlib.sha256()
    for sample in samples:
        sounds = [_stamp(clip) for clip in (*sample.audio, *([sample.answer_audio] if sample.answer_audio else []))]
        codes = None if sample.answer_codes is None else (sample.answer_codes.shape, sample.answer_codes.tolist())
        texts = [getattr(sample, name) for name in _TEXTS]
        whole.update(repr((texts, sample.history, len(sample.audio), sounds, codes)).encode("utf-8", "replace"))
    return whole.hexdigest()


class Preparer:
    """Makes rows of samples for one checkpoint. `codec`: see `codes.codec_frames`."""

    def __init__(self, spec: OmniSpec, codec: nn.Module) -> None:
        self.spec, self.codec = spec, codec

    def write(self, job: Job) -> None:
        """Writes the shard, whole or not at all. A sample that cannot be prepared keeps a row that says why."""
        import pyarrow

        schema = _schema()
        with (
            new_file(job.path) as part,
            pyarrow.OSFile(str(part), "wb") as f,
            pyarrow.ipc.new_stream(f, schema) as stream,
        ):
            for start in range(0, len(job.samples), ROWS):
                rows = [self.row(sample) for sample in job.samples[start : start + ROWS]]
                stream.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))

    def row(self, sample: Sample) -> dict[str, Any]:
        row: dict[str, Any] = {name: _clean(getattr(sample, name)) for name in _TEXTS}
        row["history"] = [[_clean(text) for text in turn] for turn in sample.history]
        try:
            return {**row, **self._mels(sample), "codes": self._codes(sample), "fault": None}
        except EdgeOmniError as exc:
            what = str(exc).removeprefix(f"{sample.where}: ")
            return {**row, "mel": [], "features": [], "frames": [], "codes": None, "fault": _clean(what)}

    def _mels(self, sample: Sample) -> dict[str, list[Any]]:
        """Columns of the question's sound. Raises AudioError where it cannot be used."""
        if not sample.audio:
            return {"mel": [], "features": [], "frames": []}
        front = self.spec.front_end
        samples = sample.sound(front.sample_rate, front.window_s)
        frames = window_samples(None, len(samples), self.spec) // front.hop
        mel = sound.log_mel(samples, front, frames)[:, : sound.mel_frames(len(samples), front)]
        return {
            "mel": [mel.astype(np.float16).reshape(-1)],
            "features": [sound.feature_count(len(samples), front)],
            "frames": [frames],
        }

    def _codes(self, sample: Sample) -> I64 | None:
        """The answer's codec frames, flat. Raises AudioError and DataError for an answer that has none."""
        codec, codes = self.spec.codec, sample.answer_codes
        if codes is None and sample.answer_audio is not None:
            codes = codec_frames(self.codec, codec, sample.answer_audio.read(codec.sample_rate))
        if codes is None:
            return None
        if codes.ndim != 2 or codes.shape[1] != codec.streams or not codes.size:
            raise DataError(f"answer_codes are of shape {codes.shape}; this codec has {codec.streams} ids per frame")
        if codes.min() < 0 or codes.max() >= codec.codebook_size:
            raise DataError(
                f"answer_codes go from {codes.min()} to {codes.max()}; this codec has ids from 0 to "
                f"{codec.codebook_size - 1}"
            )
        return codes.reshape(-1)


def start_worker(spec: OmniSpec, codec_config: Mapping[str, Any], weights: bytes) -> None:
    """Makes this process ready for `work`."""
    global _preparer
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    codec = codecs.build(codec_config)
    codec.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    _preparer = Preparer(spec, codec)


def work(job: Job) -> None:
    """Writes one shard in a worker process."""
    assert _preparer is not None
    _preparer.write(job)


_preparer: Preparer | None = None


def _die_with_parent() -> None:
    """A parent that was killed cannot end its workers; they would wait for it for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _held(clip: Clip) -> Clip:
    if isinstance(clip.source, Path):
        return clip
    try:
        return replace(clip, source=Held(clip.source()))
    except EdgeOmniError as exc:
        return replace(clip, source=Held(b"", str(exc)))


def _clean(text: str | None) -> str | None:
    """Names of files may hold halves of characters, which Arrow does not store."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _stamp(clip: Clip) -> tuple[Any, ...]:
    """What tells a sound from another one, or from itself after a change."""
    part = (clip.name, clip.start_s, clip.end_s)
    if isinstance(clip.source, Path):
        try:
            status = clip.source.stat()
        except OSError:
            return (*part, "missing")
        return (*part, status.st_size, status.st_mtime_ns)
    held = clip.source
    assert isinstance(held, Held)
    return (*part, hashlib.sha256(held.data).hexdigest(), held.fault)


def _schema() -> Any:
    """Columns of a shard. Codes are int64, so that they can be used where they lie in the file."""
    import pyarrow as pa

    return pa.schema(
        [
            *((name, pa.string()) for name in _TEXTS),
            ("history", pa.list_(pa.list_(pa.string()))),
            ("mel", pa.list_(pa.list_(pa.float16()))),
            ("features", pa.list_(pa.int32())),
            ("frames", pa.list_(pa.int32())),
            ("codes", pa.list_(pa.int64())),
            ("fault", pa.string()),
        ]
    )
