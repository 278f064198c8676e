"""Log-mels and codec frames of all samples, made once for one checkpoint, in parallel and in shards that are kept.

While it goes on, finished shards lie in `<out>.unfinished`, named by a hash of what is in them; the next run takes
those over that still hold. When all are there, they become `<out>`.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from ..arrays import F32, I64
from ..data.check import Data
from ..data.sample import Sample
from ..errors import DataError, UsageError
from ..model.omni import OmniModel
from ..outputs import check_directory, first_few, named, new_directory, strangers, write_file
from ..schema import Source, parse_json, read_bytes, typed
from .codes import codec_digest, codec_frames
from .prepare_shards import Job, Preparer, fingerprint, portable, start_worker, work
from .prepared import MANIFEST, VERSION, LeftOut, Manifest, Target, check_datasets, left_out_of, read_manifest

logger = logging.getLogger("edgeomni")

__all__ = ["codec_digest", "encode_codes", "prepare"]

Progress = Callable[[int, int], None]
"""Is told how many samples of how many are done."""
MAX_BAD = 10
UNFINISHED = ".unfinished"
_TARGET = "preparing.json"
_SHARDS, _SMALLEST = 256, 16
"""Most shards, all of which a reader keeps open; and the fewest samples of one."""
_SHARD = re.compile(r"shard-\d{5}-[0-9a-f]{16}\.arrow")


def encode_codes(model: OmniModel, samples: F32) -> I64:
    """Samples [S] at the rate of the model's codec -> codec frames int64 [ceil(S / frame_samples), K].

    Raises AudioError where there are no samples.
    """
    return codec_frames(model.codec, model.spec.codec, samples)


def prepare(
    data: Data,
    model: OmniModel,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    max_bad: int | None = MAX_BAD,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Prepares `data` (what read_data gives) for `model` in the folder `out`, in `workers` processes (default: one per
    core; 1: in this one).

    A sample that cannot be prepared is a warning and is left out, and so are the faults of the reader; more than
    `max_bad` of both (None: any number) raise DataError. Then, and when the process is killed, finished shards stay in
    `out` + UNFINISHED, and the next run goes on from there. `force` replaces an earlier preparation, and an unfinished
    one for another checkpoint. Raises UsageError where something else lies at `out`, DataError where an unfinished
    preparation there is for another checkpoint, for a full disk, and for a worker that was killed.
    """
    check_datasets()
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot prepare anything; give 1 or more")
    if not data.samples:
        raise DataError("there are no samples to prepare")
    target, aim = check_directory(out, _objection if force else None), _target(model)
    with _translated(target):
        unfinished = _begun(target, aim, force)
        left_out = [LeftOut(fault.where, fault.what) for fault in data.faults]
        shards = []
        for shard, samples in _written(data.samples, model, unfinished, workers or os.cpu_count() or 1):
            shards.append(shard)
            left_out += _told(left_out_of(unfinished / shard))
            _check_number(left_out, max_bad, unfinished)
            progress(samples, len(data.samples))
        manifest = Manifest(VERSION, aim, shards, len(data.samples), left_out)
        _finish(target, unfinished, manifest, force)
    return manifest


def _target(model: OmniModel) -> Target:
    return Target.of(model.spec, codec_digest(model.codec))


def _begun(target: Path, aim: Target, force: bool) -> Path:
    """The folder of the unfinished preparation, new or one that goes on. Raises DataError and UsageError."""
    folder = target.with_name(target.name + UNFINISHED)
    if os.path.lexists(folder):
        others = [name for name in strangers(folder, {_TARGET}) if not _SHARD.fullmatch(name) and name[0] != "."]
        if not folder.is_dir() or others:
            raise UsageError(f"{folder} is in the way and was not written here; remove it, or choose another path")
        if (folder / _TARGET).exists() and _goes_on(folder, aim, force):
            return folder
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_file(folder / _TARGET, json.dumps(asdict(aim), indent=1).encode())
    return folder


def _goes_on(folder: Path, aim: Target, force: bool) -> bool:
    """Whether an unfinished preparation is for this checkpoint. Raises DataError where it is not, unless `force`."""
    source = Source(str(folder / _TARGET), DataError, "delete the folder")
    begun = typed(parse_json(read_bytes(folder / _TARGET, source), source), Target, source)
    differences = begun.differences(aim)
    if differences and not force:
        raise DataError(
            f"{folder} holds data that are being prepared for another checkpoint ({'; '.join(differences)}); go on "
            "with that checkpoint, start anew with --force, or choose another path"
        )
    return not differences


def _written(samples: Sequence[Sample], model: OmniModel, folder: Path, workers: int) -> Iterator[tuple[str, int]]:
    """Names of the shards in order, each when it is written, and the number of samples up to it."""
    size = max(_SMALLEST, -(-len(samples) // _SHARDS))
    starts = range(0, len(samples), size)
    count = min(workers, len(starts))
    with _workers(model, count) as submit:
        waiting: deque[tuple[Job, int, Future[None] | None]] = deque()
        for number, start in enumerate(starts):
            part = [portable(samples[i]) for i in range(start, min(start + size, len(samples)))]
            job = Job(folder / f"shard-{number:05d}-{fingerprint(part)[:16]}.arrow", part)
            waiting.append((job, start + len(part), None if job.path.exists() else submit(job)))
            if len(waiting) > 2 * count or count == 1:  # the sounds of those that wait are held in memory
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())


def _done(job: Job, samples: int, future: Future[None] | None) -> tuple[str, int]:
    if future is not None:
        future.result()
    return job.path.name, samples


@contextmanager
def _workers(model: OmniModel, count: int) -> Iterator[Callable[[Job], Future[None]]]:
    """What has a job done, at once or in one of `count` processes. What waits is cancelled when the block fails."""
    if count == 1:
        preparer = Preparer(model.spec, model.codec)
        yield lambda job: _at_once(preparer, job)
        return
    weights = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.codec.state_dict().items()}, weights)
    given = (model.spec, model.codec_config, weights.getvalue())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker, given)
    try:
        yield lambda job: pool.submit(work, job)
    finally:
        pool.shutdown(cancel_futures=True)


def _at_once(preparer: Preparer, job: Job) -> Future[None]:
    preparer.write(job)
    done: Future[None] = Future()
    done.set_result(None)
    return done


def _told(left_out: list[LeftOut]) -> list[LeftOut]:
    for one in left_out:
        logger.warning("%s: left out: %s", one.where, one.what)
    return left_out


def _check_number(left_out: list[LeftOut], max_bad: int | None, unfinished: Path) -> None:
    if max_bad is not None and len(left_out) > max_bad:
        few = first_few([f"{one.where}: {one.what}" for one in left_out])
        raise DataError(
            f"more than {max_bad} samples cannot be prepared ({few}). `edgeomni data check` finds all of them; correct "
            f"them, or allow more with --max-bad. What is done stays in {unfinished}"
        )


def _finish(target: Path, unfinished: Path, manifest: Manifest, force: bool) -> None:
    """The shards of the manifest become `target`; those of samples that have changed since go."""
    with new_directory(target, _objection if force else None) as stage:
        for name in manifest.shards:
            (unfinished / name).rename(stage / name)
        text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n"
        (stage / MANIFEST).write_text(text, encoding="utf-8", errors="replace")
    shutil.rmtree(unfinished)


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as exc:
        raise DataError(
            "a worker process was ended from outside, perhaps for lack of memory; run the same command again with "
            "fewer --workers, it goes on where this one stopped"
        ) from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise DataError(f"{target}: could not be written ({reason}); free some space and run the same again") from exc


def _objection(directory: Path) -> str:
    """Why --force must not replace a directory; "" for one that `prepare` wrote."""
    try:
        known = {MANIFEST, *read_manifest(named(directory)).shards}
    except DataError:
        return "is no data that EdgeOmni prepared"
    others = strangers(directory, known)
    return f"also holds {first_few(others)}, which EdgeOmni did not write" if others else ""
