"""A spoken question from stdin: a sound file, or raw PCM whose rate is given."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from ..arrays import F32
from ..audio import decode, from_pcm16
from ..errors import AudioError, UsageError
from .common import options

STDIN = "-"
FORMATS = ("wav", "s16le")

stdin_options = options(
    click.option(
        "--stdin-format",
        type=click.Choice(FORMATS),
        default="wav",
        show_default=True,
        help="With QUESTION -: wav is any sound file (WAV, FLAC, OGG, MP3); s16le is raw mono PCM.",
    ),
    click.option("--stdin-rate", type=click.IntRange(1), metavar="HZ", help="Sample rate of s16le."),
)


def check_stdin(question: str | None, form: str, rate: int | None, channel: int | None) -> None:
    """Raises UsageError where the options for stdin do not fit together, or nothing is piped in."""
    if question != STDIN:
        if rate is not None or form != "wav":
            raise UsageError("--stdin-format and --stdin-rate are for a question from stdin: give - as QUESTION")
        return
    if form == "s16le" and rate is None:
        raise UsageError("raw PCM does not state its sample rate: give --stdin-rate HZ")
    if form == "s16le" and channel is not None:
        raise UsageError("--channel picks one of a sound file's channels; s16le is mono")
    if form == "wav" and rate is not None:
        raise UsageError("a sound file states its own sample rate: leave --stdin-rate out, or say --stdin-format s16le")
    if sys.stdin.isatty():
        raise UsageError("QUESTION - reads sound from a pipe, and stdin is the terminal; pipe a sound file into it")


def read_stdin(form: str, rate: int | None, channel: int | None) -> tuple[F32, int]:
    """All of stdin as samples [S] and their rate. Raises AudioError for what is no sound."""
    return read_stream(sys.stdin.buffer, form, rate, channel)


def read_stream(stream: BinaryIO, form: str, rate: int | None, channel: int | None) -> tuple[F32, int]:
    """A stream's bytes as mono samples [S] float32 and their rate in Hz."""
    data = stream.read()
    if not data:
        raise AudioError("stdin: nothing came through the pipe; check the command before it")
    if form == "s16le":
        assert rate is not None
        return from_pcm16(data, "stdin"), rate
    return decode(data, "stdin", channel)
