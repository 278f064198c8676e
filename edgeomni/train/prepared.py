"""Data that `edgeomni data prepare` has made: a folder of Arrow files, read from the disk as they are wanted.

    prepared.json       what the data were prepared for, the shards in order, and what was left out
    shard-....arrow     a row per sample (SCHEMA), in Arrow's streaming format, which `datasets` memory-maps

A sample that was left out keeps its row, with the reason in the column `fault`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..arrays import F32, I64
from ..audio import pad_mel
from ..data.sample import Sample
from ..errors import DataError
from ..install_hint import install_command
from ..schema import Source, is_newer, parse_json, read_bytes, typed
from ..spec import CodecSpec, FrontEndSpec, OmniSpec

MANIFEST, VERSION = "prepared.json", "1.0"
_AT_ONCE = 1000


@dataclass(frozen=True)
class Target:
    """What data are prepared for. `codec_weights`: SHA-256 of what the codec encodes with (prepare.codec_digest)."""

    front_end: FrontEndSpec
    padded_window: bool
    codec: CodecSpec
    codec_weights: str

    @classmethod
    def of(cls, spec: OmniSpec, codec_weights: str) -> Target:
        return cls(spec.front_end, spec.padded_window, spec.codec, codec_weights)

    def differences(self, other: Target) -> list[str]:
        """What is otherwise in `other`, by name and with both values."""
        found = []
        for name, ours, theirs in (
            ("front end", self.front_end, other.front_end),
            ("codec", self.codec, other.codec),
        ):
            values = asdict(ours), asdict(theirs)
            found += [
                f"{name}: {key} {values[0][key]} and {values[1][key]}"
                for key in values[0]
                if values[0][key] != values[1][key]
            ]
        if self.padded_window != other.padded_window:
            found.append(f"front end: padded_window {self.padded_window} and {other.padded_window}")
        if self.codec_weights != other.codec_weights:
            found.append("codec: other weights")
        return found


@dataclass(frozen=True)
class LeftOut:
    """A sample that could not be prepared."""

    where: str
    what: str


@dataclass(frozen=True)
class Manifest:
    """`samples`: rows of all shards, those left out included. `left_out` also holds lines that were no samples."""

    schema: str
    target: Target
    shards: list[str]
    samples: int
    left_out: list[LeftOut]


@dataclass(frozen=True, eq=False)
class StoredMel:
    """The log-mels of a sample's recordings, read when they are wanted.

    `features`: encoder features wanted of each. `frames`: mel frames of the window in which each is encoded.
    """

    rows: Any
    row: int
    n_mels: int
    features: tuple[int, ...]
    frames: tuple[int, ...]

    def __call__(self) -> F32:
        """float32 [n_mels, t] without the padding of the window; several recordings one behind the other."""
        return np.concatenate(self._stored(), axis=1)

    def windows(self) -> list[F32]:
        """Of each recording what `audio.log_mel` gives for its window, float32 [n_mels, frames], up to rounding to
        float16.
        """
        return [pad_mel(mel, frames) for mel, frames in zip(self._stored(), self.frames, strict=True)]

    def _stored(self) -> list[F32]:
        cells = self.rows[self.row].column("mel")[0].values
        return [np.asarray(cell.values.to_numpy(), np.float32).reshape(self.n_mels, -1) for cell in cells]


class PreparedSamples(Sequence[Sample]):
    """The samples of a prepared folder, without those left out. Texts are read when a sample is asked for.

    `answer_codes` lie in the memory-mapped file until they are used, `mel` is a StoredMel; `audio` is empty.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        whole = _opened([directory / name for name in manifest.shards])
        self._mels = whole.select_columns(["mel"]).with_format("arrow")
        self._rest = whole.remove_columns(["mel"]).with_format("arrow")
        self._kept = np.flatnonzero(whole.data.column("fault").is_null().to_numpy())

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._kept[index])
        return next(self._samples(row, self._rest[row]))

    def __iter__(self) -> Iterator[Sample]:
        """Many rows at a time, which is ten times as fast as one by one."""
        for start in range(0, len(self._rest), _AT_ONCE):
            yield from self._samples(start, self._rest[start : start + _AT_ONCE])

    def _samples(self, first: int, table: Any) -> Iterator[Sample]:
        """The usable rows of an Arrow table, which begins with row `first`. Codes stay where they are."""
        texts = table.drop_columns(["codes"]).to_pylist()
        for i, (cells, codes) in enumerate(zip(texts, table.column("codes"), strict=True)):
            if cells["fault"] is None:
                yield self._sample(first + i, cells, codes)

    def _sample(self, row: int, cells: dict[str, Any], codes: Any) -> Sample:
        target = self.manifest.target
        features, frames = tuple(cells["features"]), tuple(cells["frames"])
        texts = ("where", "task", "text", "answer", "system", "language", "speaker")
        return Sample(
            **{name: cells[name] for name in texts},
            answer_codes=_codes(codes, target.codec.streams),
            history=tuple((turn[0], turn[1]) for turn in cells["history"]),
            mel=StoredMel(self._mels, row, target.front_end.n_mels, features, frames) if features else None,
        )


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `edgeomni data prepare` has written the folder."""
    return (Path(path) / MANIFEST).is_file()


def read_prepared(
    directory: str | os.PathLike[str], spec: OmniSpec, codec_weights: str | None = None
) -> PreparedSamples:
    """The samples of a folder that was prepared for a checkpoint of that spec.

    `codec_weights` (prepare.codec_digest): the codec's weights are compared as well. Raises DataError for a folder
    that was prepared for another front end or codec (it says which), that is incomplete, or that is none; and where
    the package `datasets` is missing.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    wanted = Target.of(spec, manifest.target.codec_weights if codec_weights is None else codec_weights)
    if differences := manifest.target.differences(wanted):
        raise DataError(
            f"{folder} was prepared for another checkpoint than this one ({'; '.join(differences)}); prepare the data "
            "with this checkpoint: `edgeomni data prepare DATA CHECKPOINT -o DIR`"
        )
    samples = PreparedSamples(folder, manifest)
    if not len(samples):
        raise DataError(f"{folder}: every sample was left out; {MANIFEST} there says why")
    return samples


def read_manifest(directory: Path) -> Manifest:
    """Raises DataError for a folder without one, and for one that is damaged or of another version."""
    source = Source(str(directory / MANIFEST), DataError, "prepare the data again")
    data = parse_json(read_bytes(directory / MANIFEST, source), source)
    manifest = typed(data, Manifest, source, newer=is_newer(data.get("schema"), VERSION, source))
    if missing := [name for name in manifest.shards if Path(name).name != name or not (directory / name).is_file()]:
        raise source.fault(f"names {missing[0]!r}, which is not there")
    return manifest


def left_out_of(shard: Path) -> list[LeftOut]:
    """What was left out of one shard. Raises DataError for a damaged one."""
    table = _opened([shard]).data
    bad = np.flatnonzero(table.column("fault").is_valid().to_numpy())
    return [LeftOut(table.column("where")[i].as_py(), table.column("fault")[i].as_py()) for i in bad.tolist()]


def check_datasets() -> None:
    """Raises DataError that says what to install where prepared data can be neither written nor read."""
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError as exc:
        raise DataError(
            f"prepared data need the package datasets, which is not installed: {install_command('train')}"
        ) from exc


def _opened(shards: Sequence[Path]) -> Any:
    """One memory-mapped `datasets.Dataset` over all shards. Raises DataError for a damaged shard."""
    check_datasets()
    import pyarrow
    from datasets import Dataset, concatenate_datasets

    opened = []
    for shard in shards:
        try:
            opened.append(Dataset.from_file(str(shard)))
        except (pyarrow.ArrowInvalid, OSError, ValueError) as exc:
            raise DataError(f"{shard}: cannot be read ({exc}); delete it and prepare the data again") from exc
    return concatenate_datasets(opened)


def _codes(cell: Any, streams: int) -> I64 | None:
    return None if not cell.is_valid else cell.values.to_numpy(zero_copy_only=True).reshape(-1, streams)
