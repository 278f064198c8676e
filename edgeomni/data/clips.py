"""How recordings are spelled in data files: a path, base64, or either with a part of it in seconds (`a.wav:1.5-3`)."""

from __future__ import annotations

import base64
import binascii
import os
import re
import string
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import AudioError, DataError
from ..schema import short
from .records import Place
from .sample import Clip

_PART = re.compile(r"(\d{1,7}(?:\.\d{0,20})?)-(\d{1,7}(?:\.\d{0,20})?)?")
_ALPHABET = (string.ascii_letters + string.digits + "+/").encode()
_SHORTEST_BASE64 = 60
"""Characters that a WAV file's header alone takes; what is shorter is a path."""
_LONGEST_PATH = 4096
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
"""What streaming writers put in a WAV header when they cannot know the length."""


@dataclass(frozen=True)
class Inline:
    """The bytes of a sound file that stands as base64 in a data file, at `keys` of the record at `place`.

    They are read from there each time, so that a list of samples does not hold the sound of all of them.
    """

    place: Place
    keys: tuple[str | int, ...]

    def __call__(self) -> bytes:
        """Raises AudioError where the file has changed since, or the sound is cut off."""
        name = f"{self.place.where}: {spelled_keys(self.keys)}"
        try:
            value = self.place.load()
            for key in self.keys:
                value = value[key]
            data = base64.b64decode(_base64(_payload(_split(value)[0])) or b"", validate=True)
        except (DataError, LookupError, TypeError, AttributeError, binascii.Error) as exc:
            raise AudioError(f"{name}: is not what it was when the data were read ({exc}); read them again") from exc
        _refuse_cut_wav(data, name)
        return data


def clip_of(value: object, place: Place, keys: tuple[str | int, ...], folder: Path) -> Clip:
    """The clip that `value` at `keys` of a record spells. Relative paths start from `folder`.

    No file is opened. Raises DataError for what spells no clip; base64 is checked for its characters and length.
    """
    name = spelled_keys(keys)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataError(f"{name} holds {short(value)}; it must be a path, base64, or a path with :START-END in seconds")
    text, start, end = _split(value)
    if text != value and _exists(folder, value):  # a file may be called `a:1-2`
        text, start, end = value, 0.0, None
    if end is not None and end <= start:
        raise DataError(f"{name} ends at {end:g} s, before it begins ({start:g} s)")
    if text.startswith("data:") or (_is_base64(text) and not _exists(folder, text)):
        _check_base64(text, name)
        return Clip(Inline(place, keys), f"{place.where}: {name}", start, end)
    if len(text) > _LONGEST_PATH:
        raise DataError(f"{name} is too long for a path and holds characters that base64 does not have")
    if "://" in text:
        raise DataError(f"{name} is the address {short(text)}; download it and give the file's path")
    return Clip.of(folder / text, start, end)


def clips_of(value: object, place: Place, key: str, folder: Path) -> tuple[Clip, ...]:
    """One clip, a list of clips, or none (null): see `clip_of`."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(clip_of(one, place, (key, i), folder) for i, one in enumerate(value))
    return (clip_of(value, place, (key,), folder),)


def spelled(clip: Clip, folder: Path) -> str:
    """A clip as `clip_of` reads it with that folder. Sound that is no file is written as base64.

    Raises AudioError where the bytes of such sound cannot be had.
    """
    if isinstance(clip.source, Path):
        path = os.path.abspath(clip.source)
        text = _relative(path, folder) if Path(path).is_relative_to(folder) else path
    else:
        text = f"data:;base64,{base64.b64encode(clip.source()).decode()}"
    if clip.start_s or clip.end_s is not None:
        return f"{text}:{_seconds(clip.start_s)}-{'' if clip.end_s is None else _seconds(clip.end_s)}"
    return text if _split(text)[0] == text else f"{text}:0-"  # a file called `a:1-2`, from its beginning


def spelled_keys(keys: tuple[str | int, ...]) -> str:
    """("audio", 1) -> "audio[1]"."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _seconds(seconds: float) -> str:
    return str(np.format_float_positional(seconds, trim="-"))


def _relative(path: str, folder: Path) -> str:
    """The path from `folder`, so that it is not taken for sound in base64."""
    text = os.path.relpath(path, folder)
    return f"./{text}" if text.startswith("data:") or _is_base64(text) else text


def _split(value: str) -> tuple[str, float, float | None]:
    """ "a.wav:1-2.5" -> ("a.wav", 1.0, 2.5); the end is None where it is left open."""
    text, _, part = value.rpartition(":")
    found = _PART.fullmatch(part) if text else None
    if not found:
        return value, 0.0, None
    return text, float(found[1]), None if found[2] is None else float(found[2])


def _payload(text: str) -> str:
    return text.partition(",")[2] if text.startswith("data:") else text


def _is_base64(text: str) -> bool:
    return len(text) >= _SHORTEST_BASE64 and _base64(text) is not None


def _base64(text: str) -> bytes | None:
    """Base64 without white space, None for what holds other characters. Recordings are long: no regular expression."""
    raw = text.encode("ascii", "replace").translate(None, b" \t\r\n")
    padding = raw.translate(None, _ALPHABET)
    return raw if raw and padding in (b"", b"=", b"==") and raw.endswith(padding) else None


def _exists(folder: Path, text: str) -> bool:
    return len(text) <= _LONGEST_PATH and os.path.exists(os.path.join(folder, text))


def _check_base64(text: str, name: str) -> None:
    if text.startswith("data:") and not text.partition(",")[0].endswith(";base64"):
        raise DataError(f"{name} is a data: address without ;base64, which is the only kind understood")
    if (raw := _base64(_payload(text))) is None:
        raise DataError(f"{name} holds characters that base64 does not have")
    if count := len(raw) % 4:
        raise DataError(f"{name} is cut off: its base64 ends {4 - count} character(s) too early")


def _refuse_cut_wav(data: bytes, name: str) -> None:
    """libsndfile reads a cut WAV without a word, so its header is compared with the number of bytes here."""
    if data[:4] != b"RIFF" or len(data) < 12:
        return
    size = struct.unpack("<I", data[4:8])[0]
    if size not in _UNKNOWN_SIZES and size + 8 > len(data):
        raise AudioError(f"{name}: is cut off: its header announces {size + 8} bytes, {len(data)} are there")
