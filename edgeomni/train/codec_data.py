"""The recordings that a codec learns from, and the segments drawn from them.

Recordings are decoded once, at the codec's rate, into a file without a name beside the run (16-bit samples, 115 MB per
hour at 16 kHz), so that they need not fit into memory and nothing of them stays when the run ends.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.sample import Clip, Sample
from ..errors import AudioError, DataError
from .codec_config import DataConfig

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
_DESCRIBING = frozenset({".json", ".jsonl", ".scp", ".arrow"})
OVERHANG = 0.25
"""Share of a segment that may lie before or after a recording: codecs have to learn silence, too."""
HELD_OUT_AT_MOST = 0.1
_FULL_SCALE = 32767
_log = logging.getLogger("edgeomni")


def clips_of(config: DataConfig) -> list[Clip]:
    """The recordings of `config.train`: folders of sound files, or whatever edgeomni.data.readers reads.

    Raises DataError where there are none.
    """
    return [clip for source in config.train for clip in _clips_of(source, config)]


def _clips_of(source: str, config: DataConfig) -> list[Clip]:
    if files := sound_files(Path(source)):
        return [Clip.of(file) for file in files]
    from ..data.readers import read_data

    clips = clips_in(read_data(source, max_bad=config.max_bad).samples, config.use)
    if not clips:
        wanted = "answer_audio" if config.use == "answers" else "audio or answer_audio"
        raise DataError(f"{source}: no sample has {wanted}, so there is nothing to learn from")
    return clips


def sound_files(folder: Path) -> list[Path]:
    """All sound files in a folder and below, by name; none for what is no folder, or a data set.

    A folder with files directly in it that say what the recordings are (JSON, Kaldi lists, Arrow) is read by these,
    so that answers can be told from questions.
    """
    if not folder.is_dir() or any(p.suffix in _DESCRIBING for p in folder.iterdir()):
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def clips_in(samples: Iterable[Sample], use: str) -> list[Clip]:
    """The samples' recordings: of answers, or ("all") of questions as well."""
    clips: list[Clip] = []
    for sample in samples:
        clips += sample.audio if use == "all" else ()
        clips += [sample.answer_audio] if sample.answer_audio is not None else []
    return clips


@dataclass(frozen=True, eq=False)
class Waves:
    """Recordings one after the other: `samples` int16 [S] at `rate` Hz, recording i from bounds[i] to bounds[i + 1]."""

    samples: NDArray[np.int16]
    bounds: NDArray[np.int64]
    rate: int

    @property
    def seconds(self) -> float:
        return float(self.lengths.sum()) / self.rate

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.bounds)

    def cut(self, i: int, start: int, length: int) -> Tensor:
        """Float32 [length] of recording i from `start` (which may be negative), silence where it has nothing."""
        first, end = int(self.bounds[i]), int(self.bounds[i + 1])
        low, high = max(first, first + start), min(end, first + start + length)
        out = torch.zeros(length)
        if high > low:
            at = low - first - start
            out[at : at + high - low] = torch.from_numpy(self.samples[low:high].astype(np.float32) / _FULL_SCALE)
        return out

    def draw(self, chosen: NDArray[np.int64], count: int, length: int, grid: int = 1) -> Tensor:
        """`count` segments [count, length] of the recordings `chosen`, longer ones more often; torch's global random
        numbers choose. Starts are multiples of `grid` samples.
        """
        lengths = torch.from_numpy(self.lengths[chosen]).double()
        picks = torch.multinomial(lengths, count, replacement=True).tolist()
        return torch.stack([self._one(int(chosen[i]), length, grid) for i in picks])

    def _one(self, i: int, length: int, grid: int) -> Tensor:
        over = round(length * OVERHANG)
        low, high = -over, max(0, int(self.lengths[i]) - length) + over
        start = int(torch.randint(low, high + 1, ()))
        return self.cut(i, start // grid * grid, length)

    def pieces(self, chosen: NDArray[np.int64], length: int, most: int) -> Tensor:
        """The recordings `chosen` cut into whole segments [n, length], n <= most; what is shorter is padded."""
        cuts = [
            self.cut(int(i), at, length)
            for i in chosen
            for at in range(0, max(1, int(self.lengths[i]) - length + 1), length)
        ]
        return torch.stack(cuts[:most])


def read_waves(clips: Sequence[Clip], rate: int, max_bad: int, folder: Path) -> Waves:
    """Decodes all clips at `rate` Hz. Each one that cannot be read is a warning.

    Raises DataError after more than `max_bad` of them, and where nothing is left; OSError where the disk is full.
    """
    lengths, bad = [0], 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for clip in clips:
            try:
                wave = clip.read(rate)
            except AudioError as exc:
                bad += 1
                _log.warning("left out: %s", exc)
                if bad > max_bad:
                    raise DataError(
                        f"{bad} recordings cannot be used, the last: {exc}; correct the data (`edgeomni data check` "
                        "names all), or allow more with --set data.max_bad=N"
                    ) from exc
                continue
            file.write((np.clip(wave, -1, 1) * _FULL_SCALE).round().astype("<i2").tobytes())
            lengths.append(len(wave))
        file.flush()
        if len(lengths) == 1:
            raise DataError(f"none of {len(clips)} recordings can be used")
        samples = np.memmap(file, dtype="<i2", mode="r")
    return Waves(samples, np.cumsum(lengths, dtype=np.int64), rate)


def split(waves: Waves, held_out_s: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Recordings to learn from and held out, chosen by `seed`: `held_out_s` seconds, at most a tenth of all."""
    most, held = min(held_out_s, HELD_OUT_AT_MOST * waves.seconds) * waves.rate, []
    for i in np.random.default_rng(seed).permutation(len(waves.lengths)):
        if waves.lengths[i] <= most:
            held.append(i)
            most -= waves.lengths[i]
    chosen = np.asarray(sorted(held), np.int64)
    return np.setdiff1d(np.arange(len(waves.lengths)), chosen), chosen
