"""Speech from text with espeak-ng, by way of the library that PyPI's `espeakng-loader` brings: more than 100 languages.

A voice is a language's code, or a code and a variant: "es", "en-us+robosoft". The library keeps state from one text to
the next, which changes the next speech a little, and it starts its random numbers from the time. So it is loaded afresh
for every text (that takes 5 ms) and its random numbers are seeded: the same arguments always give the same samples.
"""

from __future__ import annotations

import ctypes
import difflib
import os
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..arrays import F32
from ..audio import SILENCE_PEAK, check_rate, resample
from ..errors import DataError, EngineError, UsageError
from ..install_hint import install_command

RATES_WPM = (80, 450)
"""Words per minute that espeak-ng takes."""
PITCHES = (0, 99)
"""Of the pitch, and of its range (0 is monotone)."""
VOLUMES = (5, 100)
LONGEST_TEXT = 5_000
"""In characters: about six minutes of speech."""
_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
_RATE, _VOLUME, _PITCH, _PITCH_RANGE = 1, 2, 3, 4
_SAME_AS_PLAIN = frozenset({"fast"})
"""Variants that sound as the language's plain voice does at every speed that is offered here."""
_WITHOUT_DICTIONARY = frozenset({"fo", "kaa", "xex"})
"""Languages that the package lists and has no dictionary for: their texts would be spelled letter by letter."""
_SEED = 1
_lock = threading.Lock()


@dataclass(frozen=True)
class Listed:
    """What the library lists: a language's plain voice with its codes and their priorities (low is better), or a
    variant, which has none."""

    name: str
    identifier: str
    codes: dict[str, int]
    gender: str


class _CVoice(ctypes.Structure):
    """`espeak_VOICE` of the library's public header."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("unused", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_GENDERS = {1: "male", 2: "female"}
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def languages() -> dict[str, Listed]:
    """Language code -> the plain voice of that language. Sorted by code. Raises EngineError without the library."""
    with _lock, _opened() as (lib, _):
        listed = _listed(lib, None)
    best: dict[str, Listed] = {}
    for voice in listed:
        for code, priority in voice.codes.items():
            if code not in best or priority < best[code].codes[code]:
                best[code] = voice
    return {code: best[code] for code in sorted(best) if code not in _WITHOUT_DICTIONARY}


@cache
def variants() -> dict[str, str]:
    """Variant (what stands after the "+" of a voice) -> its gender, "" where unknown. Raises EngineError."""
    with _lock, _opened() as (lib, _):
        listed = _listed(lib, "variant")
    found = {voice.identifier.rpartition("/")[2]: voice.gender for voice in listed}
    return {name: found[name] for name in sorted(found) if name not in _SAME_AS_PLAIN}


def voices(language: str) -> list[str]:
    """A language's voices: the plain one, then those with a variant. Raises UsageError for an unknown language."""
    check_voice(language)
    return [language, *(f"{language}+{variant}" for variant in variants())]


def check_voice(voice: str) -> None:
    """Raises UsageError where espeak-ng has no such voice; it would itself take an unknown variant without a word."""
    language, plus, variant = voice.partition("+")
    if language not in languages():
        raise UsageError(f"espeak-ng has no language {language!r}{_close(language, list(languages()))}")
    if plus and variant not in variants():
        raise UsageError(f"voice {voice!r}: espeak-ng has no variant {variant!r}{_close(variant, list(variants()))}")


def check_text(text: str) -> None:
    """Raises DataError for what cannot be spoken: no text, control characters, more than `LONGEST_TEXT`."""
    shown = ascii(text[:60])
    if not text.strip():
        raise DataError("there is no text to speak; write a sentence, or leave the line out")
    if odd := next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"), ""):
        raise DataError(f"the text {shown} holds the character {ascii(odd)}, which cannot be spoken; remove it")
    if len(text) > LONGEST_TEXT:
        raise DataError(f"the text {shown}... has {len(text)} characters, of at most {LONGEST_TEXT}; cut it into parts")


def say(
    text: str,
    voice: str,
    *,
    rate_wpm: int = 160,
    pitch: int = 50,
    pitch_range: int = 50,
    volume: int = 100,
    rate: int = 16_000,
) -> F32:
    """Speech of `text`: float32 samples [S] in [-1, 1] at `rate` Hz, the same for the same arguments.

    `rate_wpm`: words per minute within `RATES_WPM`. `pitch` and `pitch_range` within `PITCHES`, `volume` within
    `VOLUMES`. A few samples of silence stand at either end. Raises UsageError for an unknown voice, variant or value
    out of range, DataError for text that cannot be spoken or gives no sound, AudioError for a rate that is none, and
    EngineError where the library is missing or fails.

    Text that changes to another language (English words in a Chinese sentence) leaves about 0.1 MB in the process,
    which the library does not free; `edgeomni.data.synth` therefore uses processes that end.
    """
    check_text(text)
    check_voice(voice)
    check_rate(rate, "speech")
    _check_within("rate_wpm", rate_wpm, RATES_WPM)
    _check_within("pitch", pitch, PITCHES)
    _check_within("pitch_range", pitch_range, PITCHES)
    _check_within("volume", volume, VOLUMES)
    parameters = {_RATE: rate_wpm, _VOLUME: volume, _PITCH: pitch, _PITCH_RANGE: pitch_range}
    language, plus, variant = voice.partition("+")
    identifier = languages()[language].identifier  # the library does not take all of its own codes ("zh", "en-gb")
    with _lock:
        pcm, own_rate = _spoken(text, identifier + plus + variant, parameters)
    samples = np.asarray(pcm / 32768, np.float32)
    if not len(samples) or float(np.abs(samples).max()) < SILENCE_PEAK:
        raise DataError(f"the voice {voice} gives no sound for the text {ascii(text[:60])}; write it out in words")
    return resample(samples, own_rate, rate)


def _check_within(name: str, value: int, limits: tuple[int, int]) -> None:
    if not limits[0] <= value <= limits[1]:
        raise UsageError(f"{name} {value} is outside {limits[0]}-{limits[1]}; choose a value within")


def _spoken(text: str, voice: str, parameters: dict[int, int]) -> tuple[Any, int]:
    """int16 samples [S] and their rate in Hz, from a library that has said nothing before."""
    chunks: list[Any] = []

    def keep(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _Callback(keep)
    with _opened() as (lib, rate):
        lib.espeak_SetSynthCallback(callback)
        if lib.espeak_SetVoiceByName(voice.encode()):
            raise EngineError(f"espeak-ng cannot load its voice {voice}; install espeakng-loader again")
        for number, value in parameters.items():
            lib.espeak_SetParameter(number, int(value), 0)
        raw = text.encode() + b"\0"
        if status := lib.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, _CHARACTERS, 0, _UTF8, None, None):
            raise EngineError(f"espeak-ng failed with status {status} at the text {ascii(text[:60])}")
        lib.espeak_Synchronize()
    return np.concatenate([np.zeros(0, np.int16), *chunks]), rate


@contextmanager
def _opened() -> Iterator[tuple[Any, int]]:
    """The library in the state that it has in a new process, and its sample rate in Hz; unloaded when the block ends.

    The caller holds `_lock`. Some variants make noise of the C library's random numbers, others of the library's own.
    """
    path, data = _paths()
    process = ctypes.CDLL(None)
    _refuse_foreign_use(path)
    try:
        lib = ctypes.CDLL(path)
    except OSError as exc:
        raise EngineError(f"{path}: cannot be loaded ({exc}); {install_command('synth')}") from exc
    try:
        rate = lib.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DO_NOT_EXIT)
        if rate <= 0:
            raise EngineError(
                f"espeak-ng cannot read its data in {data}; install espeakng-loader again, in a shorter path"
            )
        process.srand(_SEED)
        lib.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        yield lib, rate
    finally:
        lib.espeak_Terminate()
        process.dlclose(ctypes.c_void_p(lib._handle))


def _paths() -> tuple[str, str]:
    """The library and its data folder. Raises EngineError where the package is missing or has neither."""
    try:
        import espeakng_loader

        path, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    except (ImportError, RuntimeError, OSError) as exc:
        raise EngineError(
            f"speech needs espeak-ng, and it is not installed ({exc}); {install_command('synth')}"
        ) from exc
    return path, data


def _refuse_foreign_use(path: str) -> None:
    """Raises EngineError where other code of this process has the library loaded: its state would be shared."""
    try:
        other = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(other._handle))
    raise EngineError("other code in this process uses the library of espeakng-loader; synthesize in another process")


def _listed(lib: Any, wanted: str | None) -> list[Listed]:
    """The library's voices; `wanted` "variant" lists the variants."""
    lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_CVoice))
    spec = _CVoice()
    asked = None if wanted is None else ctypes.create_string_buffer(wanted.encode() + b"\0")
    if asked is not None:
        spec.languages = ctypes.addressof(asked)
    found, listed = lib.espeak_ListVoices(ctypes.byref(spec) if asked is not None else None), []
    for pointer in found:
        if not pointer:
            break
        voice = pointer.contents
        codes = {} if wanted else dict(_codes(voice.languages))
        gender = _GENDERS.get(voice.gender, "")
        listed.append(Listed(voice.name.decode(), voice.identifier.decode(), codes, gender))
    return listed


def _codes(address: int) -> Iterator[tuple[str, int]]:
    """The codes at `address`: each is one byte of priority and a zero-terminated string; a zero byte ends them."""
    while priority := ctypes.string_at(address, 1)[0]:
        code = ctypes.string_at(address + 1)
        yield code.decode(), priority
        address += len(code) + 2


def _close(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: known ones like it, or how to see them all."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=5, cutoff=0.5)
    alike = f"; close to it are {', '.join(by_lower[c] for c in close)}" if close else ""
    return f"{alike}; `edgeomni data synth --list-voices` lists all"
