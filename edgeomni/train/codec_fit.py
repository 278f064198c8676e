"""Training a SNAC-type codec, from scratch or from one that exists: `fit_codec`.

The loop is our own: transformers' Trainer has one model, one loss and one optimizer, and an adversarial run has two of
each that take turns. Everything random in a step comes from the seed and the step's number, so that a run that was
killed goes on exactly as if it had not been (bit for bit on a CPU with the same number of threads).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.sample import Clip
from ..errors import TrainError, UsageError
from ..outputs import named, write_file
from . import codec_files, run_log
from .codec_config import CodecTrainConfig, read_config, to_config, written
from .codec_curves import Record, draw
from .codec_data import Waves, read_waves, split
from .codec_fast import faster
from .codec_init import initialise
from .codec_step import Learner
from .config_file import differences, set_key

CODEC, CONFIG, LOG, CURVES = "codec", "config.toml", "log.jsonl", "curves.png"
_MAY_CHANGE = ("optimizer.", "run.", "loss.", "collapse.", "data.max_bad", "adversarial.from_step", "adversarial.lr")
"""Keys that may be other when a run is resumed; batch and losses then count from there on."""
_MOST_HELD_OUT = 64
"""Segments that are judged at each validation."""
_INIT_SEGMENTS = 16


@dataclass(frozen=True)
class CodecFit:
    """Where the codec lies, the steps taken, and the last figures logged."""

    codec: Path
    steps: int
    last: Record


def check_run(out: str | os.PathLike[str], resume: bool) -> Path:
    """The run's directory. Raises UsageError where a new run would overwrite something, or there is none to resume."""
    folder = named(out)
    if resume and not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: no run to resume ({CONFIG} is missing); leave --resume out to begin one")
    if not resume and os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists; go on with it by --resume, or choose another directory")
    return folder


def resumed(out: str | os.PathLike[str], given: str | None, changes: Sequence[str]) -> CodecTrainConfig:
    """The configuration with which the run in `out` goes on: the file `given`, or else its own; with `changes`.

    Raises UsageError for a change of what the run computes on, which would make its saved state worthless.
    """
    path = check_run(out, True) / CONFIG
    before = to_config(read_config(path), str(path))
    data = read_config(Path(given) if given else path)
    for change in changes:
        set_key(data, change)
    after = to_config(data, given or str(path))
    if not after.scratch:
        after = dataclasses.replace(after, codec=before.codec)  # its sizes are those of the codec that it started from
    changed = differences(before, after)
    if refused := [key for key in changed if not key.startswith(_MAY_CHANGE)]:
        raise UsageError(
            f"{path.parent}: a resumed run cannot have another {', '.join(refused)}; leave that out, or begin a new run"
        )
    return after


def with_sizes_of_start(config: CodecTrainConfig) -> tuple[CodecTrainConfig, dict[str, torch.Tensor] | None]:
    """The configuration with the sizes of the codec that it starts from, and that codec's tensors (None: scratch).

    Raises CheckpointError for a codec that cannot be read, TrainError for values that contradict each other.
    """
    state = None
    if not config.scratch:
        sizes, state = codec_files.read_codec(config.start)
        config = dataclasses.replace(config, codec=sizes)
    config.check()
    return config, state


def fit_codec(
    config: CodecTrainConfig,
    clips: Sequence[Clip],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    on_step: Callable[[int, Record], None] = lambda step, record: None,
) -> CodecFit:
    """Trains on `clips` and writes the run's directory: codec/ (SNAC's published layout), state.pt, log.jsonl,
    config.toml and curves.png. `on_step` is called after every step with its number and what was logged then ({}
    between records).

    Raises UsageError for a directory in use, DataError for recordings that cannot be used, CheckpointError for a codec
    that cannot be read, and TrainError for contradicting values, a diverged loss, a collapsed codebook or a full disk.
    """
    folder = check_run(out, resume)
    config, state = with_sizes_of_start(config)
    with codec_files.told_disk(folder), torch.random.fork_rng():
        folder.parent.mkdir(parents=True, exist_ok=True)
        waves = read_waves(clips, config.codec.sampling_rate, config.data.max_bad, folder.parent)
        run = _Run(config, waves, folder, state)
        with faster(run.codec, config.run.fast and config.run.device == "cpu"):
            run.begin(resume)
            run.go(on_step)
    return CodecFit(folder / CODEC, config.optimizer.steps, run.last)


class _Run:
    def __init__(self, config: CodecTrainConfig, waves: Waves, folder: Path, state: Any) -> None:
        self.config, self.waves, self.folder = config, waves, folder
        self.log = run_log.RunLog(folder / LOG)
        torch.manual_seed(config.seed)
        self.codec: nn.Module = codec_files.build(config.codec, state).to(_device(config))
        self.learnt, held = split(waves, config.data.held_out_s, config.seed)
        self.learner = Learner(config, self.codec)
        self.held = waves.pieces(held, config.data.segment, _MOST_HELD_OUT) if len(held) else None
        self.frozen = codec_files.digest(self.codec.encoder, self.codec.quantizer)
        self.done, self.pending, self.last = 0, list[Record](), Record()

    def begin(self, resume: bool) -> None:
        """Makes the directory and initialises the codec, or goes on from the last state saved."""
        self.folder.mkdir(exist_ok=True)
        write_file(self.folder / CONFIG, written(self.config).encode(), force=True)
        saved = codec_files.read_state(self.folder) if resume else None
        if saved is None:
            if self.config.scratch and self.config.quantizer.init == "lsuv":
                initialise(self.codec, self.learner.quantizer, self._draw(_INIT_SEGMENTS)[:, None])
        else:
            self.learner.restore(saved["learner"])
            self.done, self.pending, self.frozen = saved["step"], saved["pending"], saved["frozen"]
        self.log.trim(self.done)
        for record in run_log.read(self.log.path) if self.log.path.exists() else ():
            self.last |= record

    def go(self, on_step: Callable[[int, Record], None]) -> None:
        config, began = self.config, perf_counter()
        for step in range(self.done + 1, config.optimizer.steps + 1):
            torch.manual_seed(config.seed * 2**31 + step)
            self.learner.begin_codes(step, self._draw)
            with _told_torch(step):
                self.pending.append(self.learner.step(step, self._draw(config.optimizer.batch)))
            self.done = step
            record = self._record(step)
            if "loss" in record:
                took, began = perf_counter() - began, perf_counter()
                heard = config.run.log_every * config.optimizer.batch * config.data.segment / config.codec.sampling_rate
                record["audio_s_per_s"] = round(heard / max(took, 1e-9), 3)
            if record:
                self.last |= record
                self.log.write(record)
            if step % config.run.save_every == 0 or step == config.optimizer.steps:
                self._save()
            on_step(step, record)
        self._check_frozen()

    def _record(self, step: int) -> Record:
        """What is to be logged after `step`: means since the last record, and the validation; {} for nothing."""
        run, end = self.config.run, step == self.config.optimizer.steps
        record: Record = {}
        if step % run.log_every == 0 or end:
            names = {name: None for figures in self.pending for name in figures}
            means = {n: float(np.mean([f[n] for f in self.pending if n in f])) for n in names}
            record = {"step": step, **means, "lr": self.learner.rate(step), **self._use(step)}
            self.pending = []
        if self.held is not None and (step % run.validate_every == 0 or end):
            record = {"step": step, **record, **self.learner.validate(self.held)}
        return record

    def _use(self, step: int) -> Record:
        if self.learner.began is None:
            return {}
        uses = self.learner.use
        return {"used": [u.used(step) for u in uses], "perplexity": [round(u.perplexity(), 2) for u in uses]}

    def _draw(self, count: int) -> torch.Tensor:
        """`count` segments, with the surroundings that decoder_only wants, on its grid of codes."""
        margin = self.learner.margin
        grid = self.config.codec.unit if margin else 1
        wave = self.waves.draw(self.learnt, count, self.config.data.segment + 2 * margin, grid)
        return wave.to(self.learner.device)

    def _save(self) -> None:
        """The state, and the codec as soon as it has codes."""
        state = {"step": self.done, "learner": self.learner.state(), "pending": self.pending, "frozen": self.frozen}
        codec_files.write_state(state, self.folder)
        if self.learner.began is not None:
            codec_files.write_codec(self.codec, self.config.codec, self.folder / CODEC)
        draw(run_log.read(self.log.path), self.folder / CURVES)

    def _check_frozen(self) -> None:
        """With decoder_only, encoder, projections and codebooks must be bit for bit what they were."""
        now = codec_files.digest(self.codec.encoder, self.codec.quantizer)
        if self.config.decoder_only and now != self.frozen:
            raise TrainError(
                f"{self.folder}: encoder or codebooks moved although decoder_only was asked; this is an error of "
                "EdgeOmni: report it, and do not use this codec with codes that were made before"
            )


@contextmanager
def _told_torch(step: int) -> Iterator[None]:
    """What torch raises in a step, which is mostly memory that ran out or a compiler that fails, as a TrainError."""
    try:
        yield
    except RuntimeError as exc:
        reason = (str(exc).splitlines() or [""])[0]
        raise TrainError(
            f"step {step}: torch stopped ({type(exc).__name__}: {reason}). Where memory ran out, take a smaller "
            "optimizer.batch or data.segment; where run.compile is true, try it without"
        ) from exc


def _device(config: CodecTrainConfig) -> str:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise TrainError("run.device is cuda, and torch sees no CUDA device here; use run.device = cpu")
    return config.run.device
