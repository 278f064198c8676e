"""`edgeomni train-codec`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .common import console, options, plain_messages

if TYPE_CHECKING:
    from ..train.codec_config import CodecTrainConfig

Told = Callable[[int, dict[str, Any]], None]

what_options = options(
    click.option("--data", multiple=True, help="Data as `edgeomni train` reads it, or a folder of sound files."),
    click.option("--use", type=click.Choice(["answers", "all"]), help="Recordings: of answers, or all [default: all]."),
    click.option("--init", help="Codec to start from: scratch, a codec's or checkpoint's directory, or a hub id."),
    click.option("--decoder-only", is_flag=True, help="Train the decoder alone; codes stay as they are."),
    click.option("--adversarial-from", type=click.IntRange(0), help="Step from which discriminators judge."),
)
how_options = options(
    click.option("--steps", type=click.IntRange(1), help="Steps in all [default: 4000]."),
    click.option("--batch", type=click.IntRange(1), help="Segments per step [default: 8]."),
    click.option("--seed", type=click.IntRange(0), help="Seed of everything random [default: 0]."),
    click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Any key of the configuration."),
    click.option("--resume", is_flag=True, help="Go on with the run in RUN, from its last saved state."),
)


@click.command("train-codec")
@click.argument("source", required=False)
@what_options
@how_options
@click.option("-o", "--output", metavar="RUN", required=True, help="Directory of the run.")
def train_codec_(source: str | None, output: str, resume: bool, **given: Any) -> None:
    """Train a SNAC-type codec: from scratch, or on from the codec of SOURCE.

    SOURCE is a configuration (.toml), a codec's directory, or a checkpoint whose codec is taken. RUN/codec is then a
    codec in SNAC's published layout, as `edgeomni init --codec` takes it.

    \b
    edgeomni train-codec --data recordings/ -o run
    edgeomni train-codec ckpt --data train.jsonl --use answers --decoder-only --steps 1500 -o run
    edgeomni train-codec --resume -o run
    """
    from ..train import codec_config, codec_data, codec_fit, config_file

    codec_fit.check_run(output, resume)
    settings, file = _settings(source, **given), source if _is_config(source) else None
    if resume:
        fitted = codec_fit.resumed(output, file, settings)
    else:
        data = codec_config.read_config(Path(file)) if file else {}
        for setting in settings:
            config_file.set_key(data, setting)
        fitted = codec_config.to_config(data, file or "the options")
    if not fitted.data.train:
        raise UsageError("no data: give --data DATA, or data.train in the configuration")
    with plain_messages(), progress(fitted) as told:
        clips = codec_data.clips_of(fitted.data)
        done = codec_fit.fit_codec(fitted, clips, output, resume=resume, on_step=told)
    click.echo(f"{done.codec}: written after {done.steps} steps{_outcome(done.last, fitted)}", err=True)


def _is_config(source: str | None) -> bool:
    return bool(source and source.endswith(".toml"))


def _settings(
    source: str | None,
    *,
    data: Sequence[str],
    use: str | None,
    init: str | None,
    decoder_only: bool,
    adversarial_from: int | None,
    steps: int | None,
    batch: int | None,
    seed: int | None,
    settings: Sequence[str],
) -> list[str]:
    """The options as settings of the configuration; what --set says comes last. Paths are made absolute."""
    start = None if source is None or _is_config(source) else source
    if start and init:
        raise UsageError(f"SOURCE {start} and --init {init} both name a codec to start from; give one of them")
    named = {
        "start": _absolute(start or init),
        "data.train": [_absolute(d) for d in data] or None,
        "data.use": use,
        "decoder_only": decoder_only or None,
        "adversarial.from_step": adversarial_from,
        "optimizer.steps": steps,
        "optimizer.batch": batch,
        "seed": seed,
    }
    return [*(f"{key}={_toml(value)}" for key, value in named.items() if value is not None), *settings]


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path and os.path.exists(path) else path


def _toml(value: Any) -> str:
    import json

    return json.dumps(value)


@contextmanager
def progress(config: CodecTrainConfig) -> Iterator[Told]:
    """What is told of each step: a bar on a terminal, a line per record elsewhere; both on stderr."""
    out = console(err=True)
    if not out.is_terminal:
        yield _lines(config)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=out) as bar:
        task = bar.add_task("", total=config.optimizer.steps, said="")
        said: dict[str, Any] = {}

        def told(step: int, record: dict[str, Any]) -> None:
            said.update(record)
            bar.update(task, completed=step, said=_said(said, config))

        yield told


def _lines(config: CodecTrainConfig) -> Told:
    began, first = perf_counter(), None

    def told(step: int, record: dict[str, Any]) -> None:
        nonlocal first
        first = step if first is None else first
        if record:
            left = (perf_counter() - began) / (step - first + 1) * (config.optimizer.steps - step)
            left_text = f", {left / 60:.0f} min left" if step < config.optimizer.steps else ""
            click.echo(f"step {step} of {config.optimizer.steps}: {_said(record, config)}{left_text}", err=True)

    return told


def _said(record: dict[str, Any], config: CodecTrainConfig) -> str:
    """A record in words: "loss 0.8123, log10-mel 0.61, codes used 300 312 330 of 512, 6.1 s of audio per s"."""
    numbers = {"loss": "loss", "log_mel": "log10-mel", "held_out": "held-out log10-mel"}
    parts = [f"{name} {record[key]:.4f}" for key, name in numbers.items() if key in record]
    if "used" in record:
        parts.append(f"codes used {' '.join(map(str, record['used']))} of {config.codec.codebook_size}")
    if "audio_s_per_s" in record:
        parts.append(f"{record['audio_s_per_s']:.1f} s of audio per s")
    return ", ".join(parts)


def _outcome(last: dict[str, Any], config: CodecTrainConfig) -> str:
    kept: dict[str, Any] = {key: last[key] for key in ("held_out", "used") if key in last}
    return f"; {_said(kept, config)}" if kept else ""
