"""Where an answer goes: text to the terminal; audio to a file, to stdout as raw PCM, to the loudspeaker."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..arrays import F32, I32
from ..audio import WavWriter, to_pcm16
from ..errors import EngineError, UsageError
from ..install_hint import install_command
from ..spec import AUDIO_OUT
from .common import fresh

STDOUT = "-"

logger = logging.getLogger("edgeomni")


def check_outputs(speaks: bool, output: str | None, play: bool, tokens_out: str | None, force: bool) -> bool:
    """Refuses outputs that cannot be written before anything is loaded; returns `speaks`."""
    if output and output != STDOUT and speaks:
        fresh(output, force)
    if tokens_out and not tokens_out.endswith(".npz"):
        raise UsageError(f"--tokens-out {tokens_out}: the name must end in .npz")
    if tokens_out:
        fresh(tokens_out, force)
    if (output or play) and not speaks:
        logger.warning("this task answers in text only: no audio will be written or played")
    return speaks


class Sinks:
    """Opens what was asked for; on an error or Ctrl-C no half file stays."""

    def __init__(self, output: str | None, play: bool, rate: int) -> None:
        self._output, self._play, self._rate = output, play, rate
        self._raw = output == STDOUT
        self._stack = ExitStack()
        self._wav: WavWriter | None = None
        self._speaker: Any = None

    def __enter__(self) -> Sinks:
        with ExitStack() as stack:
            if self._output and not self._raw:
                self._wav = stack.enter_context(WavWriter(self._output, self._rate))
            if self._play:
                self._speaker = stack.enter_context(_speaker(self._rate))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, exc: Any, tb: Any) -> None:
        self._stack.__exit__(kind, exc, tb)

    def text(self, delta: str) -> None:
        """Text goes to stdout, unless stdout carries the sound. A reader that leaves does not cost the sound file."""
        try:
            click.echo(delta, nl=False, err=self._raw)
        except BrokenPipeError:
            if self._wav is None and self._speaker is None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self._raw else sys.stdout).fileno())

    def audio(self, samples: F32) -> None:
        """Samples [S] to every open sink."""
        if self._wav:
            self._wav.write(samples)
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


def save_tokens(path: str, tokens: I32, task: str) -> None:
    """Array `tokens`: int32 [K+1, frames], audio streams first; for tasks without audio the text row [frames]."""
    out = Path(path)
    handle, part = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            np.savez(f, tokens=tokens if task in AUDIO_OUT else tokens[-1])
        os.chmod(part, 0o644)
        os.replace(part, out)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
