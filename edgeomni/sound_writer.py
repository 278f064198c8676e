"""Writes an answer's sound, chunk by chunk, in the format that the file's suffix names."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile
from numpy.typing import NDArray

from .arrays import F32
from .audio import to_pcm16
from .errors import AudioError, UsageError
from .outputs import check_file, is_special, new_file

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
"""Suffix -> libsndfile's format and subtype."""
MAX_VORBIS_RATE_HZ = 200_000
"""libsndfile crashes beyond it instead of refusing."""
_BLOCK = 1 << 16
"""Samples per call: libsndfile's Vorbis encoder overflows the stack on some millions at once."""
_NEED_SOUND = (".flac", ".mp3")
"""Formats in which a file without any sample cannot be read back."""
_ENDLESS = 0xFFFFFFFF
"""Size in the header of a WAV whose length is not known when it begins."""

Put = Callable[[NDArray[np.int16]], object]


def check_sound_file(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The path, if a sound file may be written there. Raises UsageError as `check_file` does, and for the suffix."""
    shown = check_file(path, force)
    suffix = shown.suffix.lower()
    if is_special(shown):
        if suffix in FORMATS and suffix != ".wav":
            raise UsageError(f"{shown} is a pipe or a device, which takes WAV only; give it a name without {suffix}")
        return shown
    offered = [s for s, (kind, _) in FORMATS.items() if kind in soundfile.available_formats()]
    if suffix not in offered:
        version = soundfile.__libsndfile_version__
        why = f"libsndfile {version} cannot write" if suffix in FORMATS else "no sound format has the suffix"
        raise UsageError(f"{shown}: {why} {suffix or '(none)'}; end the name in {', '.join(offered)}")
    return shown


class SoundWriter:
    """Writes mono sound chunk by chunk; the file appears under its name only when the block has ended well.

    The suffix of `path` chooses WAV or FLAC (16 bit, without loss), Ogg Vorbis or MP3. A pipe or a device gets WAV as
    it comes. `force` allows to overwrite a file. Raises UsageError for a file that exists, also if it appeared
    meanwhile, for a missing folder and for another suffix; AudioError for a sample rate that the format refuses and
    for what the disk refuses.

    >>> with SoundWriter("answer.wav", 24000) as out:  # doctest: +SKIP
    ...     out.write(samples)
    """

    def __init__(self, path: str | os.PathLike[str], rate: int, *, force: bool = False) -> None:
        self.path, self.rate, self.force = check_sound_file(path, force), rate, force
        self._stack = ExitStack()
        self._put: Put | None = None

    def write(self, samples: F32) -> None:
        """Appends float samples [S] in [-1, 1]; what lies beyond is clipped."""
        assert self._put is not None, "SoundWriter is used in a with block"
        with _told(self.path):
            self._put(to_pcm16(samples))

    def __enter__(self) -> SoundWriter:
        with _told(self.path), ExitStack() as stack:
            part = stack.enter_context(new_file(self.path, self.force))
            kind = _streamed if is_special(part) else _encoded
            self._put = stack.enter_context(kind(part, self.path.suffix.lower(), self.rate))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put = None
        if kind is not None:
            self._stack.__exit__(kind, exc, trace)
            return
        with _told(self.path):
            self._stack.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the disk or libsndfile refuses becomes an AudioError."""
    try:
        yield
    except BrokenPipeError as exc:
        raise AudioError(f"{path}: whoever was reading it has left; the rest of the sound is lost") from exc
    except soundfile.LibsndfileError as exc:
        raise AudioError(f"{path}: cannot be written ({exc.error_string}); is the disk full?") from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise AudioError(f"{path}: cannot be written ({reason}); choose another place") from exc


@contextmanager
def _encoded(part: Path, suffix: str, rate: int) -> Iterator[Put]:
    """Yields what appends samples to a sound file."""
    with _opened(part, suffix, rate) as file:

        def put(samples: NDArray[np.int16]) -> None:
            for at in range(0, len(samples), _BLOCK):
                file.write(samples[at : at + _BLOCK])

        yield put
        if suffix in _NEED_SOUND and not file.frames:
            put(np.zeros(1, np.int16))


def _opened(part: Path, suffix: str, rate: int) -> soundfile.SoundFile:
    kind, subtype = FORMATS[suffix]
    try:
        if kind == "OGG" and rate > MAX_VORBIS_RATE_HZ:
            raise AudioError(f"Ogg Vorbis ends at {MAX_VORBIS_RATE_HZ} Hz, and this is {rate} Hz; write a .wav")
        return soundfile.SoundFile(part, "w", rate, 1, subtype, format=kind)
    except soundfile.LibsndfileError as exc:
        raise AudioError(f"{kind} at {rate} Hz is refused: {exc.error_string}; write a .wav instead") from exc


@contextmanager
def _streamed(part: Path, suffix: str, rate: int) -> Iterator[Put]:
    """Yields what sends samples on at once, as a WAV of unknown length."""
    with part.open("wb", buffering=0) as out:

        def send(data: bytes) -> None:
            while data:
                data = data[out.write(data) :]

        send(_endless_header(rate))
        yield lambda samples: send(samples.astype("<i2").tobytes())


def _endless_header(rate: int) -> bytes:
    """The header of a mono 16-bit PCM WAV whose length is not known yet."""
    layout = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)  # PCM, channels, Hz, bytes per second and frame, bits
    return (
        struct.pack("<4sI8sI", b"RIFF", _ENDLESS, b"WAVEfmt ", len(layout))
        + layout
        + struct.pack("<4sI", b"data", _ENDLESS)
    )
