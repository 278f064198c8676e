"""Recognisers: they write down what they hear in a spoken answer."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from ..arrays import F32
from ..audio import resample, to_pcm16
from ..errors import DataError, EngineError, UsageError
from ..install_hint import install_command
from ..outputs import first_few
from .metrics import normalised

logger = logging.getLogger("edgeomni")

POCKETSPHINX = "pocketsphinx"
RATE = 16000
"""Hz at which every recogniser gets its sound."""
WAV = "{wav}"
TIMEOUT_S = 120.0
_SILENCE_BEFORE_S, _SILENCE_AFTER_S = 0.1, 0.2
"""pocketsphinx loses the ends of words that touch the ends of the sound."""
_AROUND = re.compile(r"^\W+|\W+$")
"""Signs before and after a word."""
_TAIL = 500
"""Characters of a failed command's stderr that are shown."""


class Recogniser(Protocol):
    """Hears speech. `name` is what results call it."""

    name: str

    def hear(self, samples: F32) -> str:
        """Samples float32 [S], mono, 16 kHz -> what was said; "" where nothing was understood."""
        ...


class Hearings:
    """A recogniser that hears every sound once: the same samples are answered from memory afterwards.

    `recogniser` may be a name for `recogniser_of`, which is then called with `sentences` when it is first needed.
    """

    def __init__(
        self, recogniser: Recogniser | str, sentences: Sequence[str] = (), timeout_s: float = TIMEOUT_S
    ) -> None:
        self._given, self._sentences, self._timeout_s = recogniser, sentences, timeout_s
        self._heard: dict[bytes, str] = {}

    @cached_property
    def recogniser(self) -> Recogniser:
        """Raises what `recogniser_of` raises."""
        given = self._given
        return recogniser_of(given, self._sentences, self._timeout_s) if isinstance(given, str) else given

    def check(self) -> None:
        """Makes the recogniser now, so that what it lacks is told before a model answers. Raises as `recogniser_of`."""
        _ = self.recogniser

    def hear(self, samples: F32, rate: int) -> str:
        """Samples float32 [S] at `rate` Hz -> what was said; "" for no sound, and for NaN and infinite samples."""
        if not len(samples) or not np.isfinite(samples).all():
            return ""
        sound = resample(samples, rate, RATE)
        key = hashlib.sha256(sound.tobytes()).digest()
        if key not in self._heard:
            self._heard[key] = self.recogniser.hear(sound)
        return self._heard[key]


def recogniser_of(name: str, sentences: Sequence[str], timeout_s: float = TIMEOUT_S) -> Recogniser:
    """`pocketsphinx`, which then expects one of `sentences`, or a command that prints a transcript of a WAV file.

    Raises UsageError for a name that is neither, DataError for sentences that pocketsphinx can make nothing of, and
    EngineError where it is not installed.
    """
    return PocketSphinx(sentences) if name.strip() == POCKETSPHINX else Command(name, timeout_s)


class Command:
    """Any command that prints what it hears in a WAV file (16-bit, mono, 16 kHz) on stdout.

    `{wav}` in `line` becomes the file's path; without it the path comes last. The line is split as a shell splits it,
    and run without one. Raises UsageError where the line cannot be split or names no program.
    """

    def __init__(self, line: str, timeout_s: float = TIMEOUT_S) -> None:
        self.name, self._timeout_s = line, timeout_s
        try:
            words = shlex.split(line)
        except ValueError as exc:
            raise UsageError(f"--recogniser {line!r} cannot be split into words ({exc}); check its quotes") from exc
        if not words or shutil.which(words[0]) is None:
            raise UsageError(
                f"--recogniser {line!r}: no such program; give {POCKETSPHINX}, or a command that prints the transcript "
                f"of a sound file, such as 'transcribe --quiet {WAV}'"
            )
        self._words = words if any(WAV in word for word in words) else [*words, WAV]

    def hear(self, samples: F32) -> str:
        """Raises EngineError where the command fails or takes too long."""
        with tempfile.TemporaryDirectory(prefix="edgeomni-hear-") as folder:
            wav = Path(folder) / "answer.wav"
            soundfile.write(wav, to_pcm16(samples), RATE, subtype="PCM_16")
            return self._run([word.replace(WAV, os.fspath(wav)) for word in self._words])

    def _run(self, words: list[str]) -> str:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            child = subprocess.Popen(words, start_new_session=True, **pipes)
        except OSError as exc:
            raise EngineError(f"the recogniser {self.name!r} cannot be started: {exc.strerror}") from exc
        with child:
            try:
                out, err = child.communicate(timeout=self._timeout_s)
            except subprocess.TimeoutExpired as exc:
                _end(child)
                raise EngineError(
                    f"the recogniser {self.name!r} did not answer within {self._timeout_s:g} s; allow it more with "
                    "--recogniser-timeout, or give a faster one"
                ) from exc
            except BaseException:
                _end(child)
                raise
        if child.returncode:
            said = err.decode("utf-8", errors="replace").strip()[-_TAIL:] or "nothing on stderr"
            raise EngineError(f"the recogniser {self.name!r} failed with exit code {child.returncode}: {said}")
        return " ".join(out.decode("utf-8", errors="replace").split())


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the command with everything that it started: a child of its own would keep the pipes open."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        child.kill()


class PocketSphinx:
    """pocketsphinx with its English model and one grammar: what it hears is one of `sentences`, or nothing.

    A sentence with a word that the dictionary lacks is left out of the grammar: it cannot be heard, which lowers the
    answer and the ceiling alike. `left_out` names those sentences with their unknown words. Raises EngineError where
    pocketsphinx is not installed, DataError where fewer than two sentences are left: anything would sound like one.
    """

    name = POCKETSPHINX

    def __init__(self, sentences: Sequence[str]) -> None:
        self._decoder = _decoder()
        self.left_out: dict[str, list[str]] = {}
        known: dict[str, None] = {}
        for sentence in dict.fromkeys(sentences):
            words, missing = grammar_words(sentence, self._knows)
            if missing:
                self.left_out[sentence] = missing
            elif words:
                known[" ".join(words)] = None
        self._say_what_is_left_out()
        if len(known) < 2:
            raise DataError(
                f"pocketsphinx hears whichever answer of the test set sounds nearest, and of these answers its English "
                f"dictionary knows {len(known)}, where it takes two or more; give more samples, or another recogniser"
            )
        grammar = f"#JSGF V1.0;\ngrammar answers;\npublic <answer> = {' | '.join(known)};\n"
        self._decoder.add_jsgf_string("answers", grammar)
        self._decoder.activate_search("answers")

    def hear(self, samples: F32) -> str:
        quiet = [np.zeros(round(s * RATE), np.float32) for s in (_SILENCE_BEFORE_S, _SILENCE_AFTER_S)]
        self._decoder.start_utt()
        self._decoder.process_raw(to_pcm16(np.concatenate([quiet[0], samples, quiet[1]])).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return str(found.hypstr) if found else ""

    def _knows(self, word: str) -> bool:
        """Signs are no words, though the dictionary has entries such as "<s>" of its own: a grammar would obey them."""
        return word.replace("'", "").isalnum() and self._decoder.lookup_word(word) is not None

    def _say_what_is_left_out(self) -> None:
        if self.left_out:
            words = sorted({word for missing in self.left_out.values() for word in missing})
            logger.warning(
                "%d answer(s) hold words that pocketsphinx's dictionary lacks (%s): they are left out of its grammar "
                "and count as not heard right in the answer and in the ceiling",
                len(self.left_out),
                first_few(words),
            )


def grammar_words(sentence: str, is_known: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The sentence's words as the dictionary spells them ("don't" as well as "dont"), and those that it lacks."""
    words, missing = [], []
    for spoken in sentence.replace("’", "'").split():
        inner = _AROUND.sub("", spoken.lower())
        whole = [inner] if "'" in inner and is_known(inner) else normalised(spoken).split()
        words += whole
        missing += [word for word in whole if not is_known(word)]
    return words, missing


def _decoder() -> Any:
    try:
        from pocketsphinx import Decoder, get_model_path
    except ImportError as exc:
        raise EngineError(f"pocketsphinx is not installed: {install_command('evaluate')}") from exc
    model = Path(get_model_path()) / "en-us"
    try:
        return Decoder(hmm=str(model / "en-us"), dict=str(model / "cmudict-en-us.dict"), lm=None, loglevel="FATAL")
    except RuntimeError as exc:
        raise EngineError(f"pocketsphinx cannot open its English model ({exc}); install it again") from exc
