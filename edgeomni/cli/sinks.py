"""Where an answer goes: text to the terminal; audio to a file, to stdout as raw PCM, to the loudspeaker."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import ExitStack
from typing import Any

import click
import numpy as np

from ..arrays import F32, I32
from ..audio import to_pcm16
from ..errors import EngineError, UsageError
from ..install_hint import install_command
from ..outputs import check_file, same_file, write_file
from ..sound_writer import SoundWriter, check_sound_file
from ..spec import AUDIO_OUT
from .terminal import answer_text

STDOUT = "-"

logger = logging.getLogger("edgeomni")


def check_outputs(speaks: bool, output: str | None, play: bool, tokens_out: str | None, force: bool) -> bool:
    """Refuses outputs that cannot be written before anything is loaded; returns `speaks`."""
    if "" in (output, tokens_out):
        raise UsageError(f"{'-o' if output == '' else '--tokens-out'} is empty; give a file name")
    if output and output != STDOUT and speaks:
        check_sound_file(output, force)
    if tokens_out and not tokens_out.endswith(".npz"):
        raise UsageError(f"--tokens-out {tokens_out}: the name must end in .npz")
    if tokens_out:
        check_file(tokens_out, force)
    if output and tokens_out and output != STDOUT and same_file(output, tokens_out):
        raise UsageError(f"-o {output} and --tokens-out {tokens_out} are the same file; give two names")
    if (output or play) and not speaks:
        logger.warning("this task answers in text only: no audio will be written or played")
    return speaks


class Sinks:
    """Opens what was asked for; on an error or Ctrl-C no half file stays."""

    def __init__(self, output: str | None, play: bool, rate: int, force: bool = False) -> None:
        self._output, self._play, self._rate, self._force = output, play, rate, force
        self._raw = output == STDOUT
        self._stack = ExitStack()
        self._file: SoundWriter | None = None
        self._speaker: Any = None

    def __enter__(self) -> Sinks:
        with ExitStack() as stack:
            if self._output and not self._raw:
                self._file = stack.enter_context(SoundWriter(self._output, self._rate, force=self._force))
            if self._play:
                self._speaker = stack.enter_context(_speaker(self._rate))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, exc: Any, tb: Any) -> None:
        self._stack.__exit__(kind, exc, tb)

    def text(self, delta: str) -> None:
        """Text goes to stdout, unless stdout carries the sound. A reader that leaves does not cost the sound file."""
        try:
            click.echo(answer_text(delta), nl=False, err=self._raw)
        except BrokenPipeError:
            if self._file is None and self._speaker is None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self._raw else sys.stdout).fileno())

    def audio(self, samples: F32) -> None:
        """Samples [S] to every open sink."""
        if self._file:
            self._file.write(samples)
        if self._raw:
            out = sys.stdout.buffer
            out.write(to_pcm16(samples).astype("<i2").tobytes())
            out.flush()
        if self._speaker:
            self._speaker.write(samples[:, None])


def _speaker(rate: int) -> Any:
    try:
        import sounddevice
    except (ImportError, OSError) as exc:  # OSError: PortAudio itself is missing
        raise EngineError(f"--play needs sounddevice and PortAudio ({exc}); {install_command('play')}") from exc
    try:
        return sounddevice.OutputStream(samplerate=rate, channels=1, dtype="float32")
    except sounddevice.PortAudioError as exc:
        raise EngineError(f"the loudspeaker cannot be opened ({exc}); leave --play out and use -o") from exc


def save_tokens(path: str, tokens: I32, task: str, force: bool = False) -> None:
    """Array `tokens`: int32 [K+1, frames], audio streams first; for tasks without audio the text row [frames]."""
    data = io.BytesIO()
    np.savez(data, tokens=tokens if task in AUDIO_OUT else tokens[-1])
    write_file(path, data.getvalue(), force)
