"""Damaged and hostile sound files: each ends in samples or in an AudioError, in bounded memory, and nothing else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeomni import audio
from edgeomni.errors import AudioError

RATE = 16000
MEGABYTE = 1 << 20
BOUNDED = settings(max_examples=40, derandomize=True, deadline=None, database=None)
TONE = (0.3 * np.sin(np.arange(1600) * 0.1)).astype(np.float32)
STEREO = np.stack([TONE, -0.5 * TONE], 1)
FORMATS = {
    "pcm16.wav": (TONE, {"subtype": "PCM_16"}),
    "float.wav": (STEREO, {"subtype": "FLOAT"}),
    "extensible.wav": (STEREO, {"subtype": "PCM_24", "format": "WAVEX"}),
    "big.wav": (TONE, {"subtype": "PCM_16", "format": "RF64"}),
    "a.flac": (STEREO, {}),
    "a.ogg": (TONE, {}),
    "a.mp3": (TONE, {}),
    "a.aiff": (TONE, {}),
}
FIELDS = (0, 1, 2, 3, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
"""What a header's 32-bit fields are overwritten with: the values at which readers go wrong."""

Edits = list[tuple[int, bytes]]
flips = st.lists(st.tuples(st.integers(0, 8000), st.binary(min_size=1, max_size=4)), max_size=6)
values = st.sampled_from(FIELDS).map(lambda n: struct.pack("<I", n))
fields = st.lists(st.tuples(st.integers(0, 80), values), max_size=3)
lengths = st.one_of(st.just(1.0), st.floats(0, 1))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder, found = tmp_path_factory.mktemp("sound"), {}
    for name, (samples, options) in FORMATS.items():
        soundfile.write(folder / name, samples, RATE, **options)
        found[name] = (folder / name).read_bytes()
    return found


def altered(data: bytes, edits: Edits, keep: float) -> bytes:
    out = bytearray(data)
    for place, value in edits:
        at = place % len(out)
        out[at : at + len(value)] = value[: len(out) - at]
    return bytes(out[: int(keep * len(out))])


def read_or_refused(path: Path) -> None:
    """Reads the file, and looks at what comes out as a caller would."""
    try:
        samples = audio.read(path, RATE)
    except AudioError as exc:
        assert path.name in str(exc)
        return
    assert samples.ndim == 1 and samples.dtype == np.float32 and len(samples)
    assert np.isfinite(samples).all() and np.abs(samples).max() <= audio.LOUDEST


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_sound_files(name: str, originals: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / name

    @BOUNDED
    @given(flips, fields, lengths)
    def check(anywhere: Edits, header: Edits, keep: float) -> None:
        path.write_bytes(altered(originals[name], anywhere + header, keep))
        read_or_refused(path)

    path.write_bytes(originals[name])
    assert abs(len(audio.read(path, RATE)) - len(TONE)) <= 1200, "the undamaged file is read"
    check()


def wav_that_announces_too_much(data: bytes) -> bytes:
    at = data.index(b"data") + 4
    return data[:at] + struct.pack("<I", 0xFFFFFFFF) + data[at + 4 :]


def flac_that_announces_too_much(data: bytes) -> bytes:
    """The stream info's 36-bit count of samples, set to its largest value."""
    at = 8 + 13
    return data[:at] + bytes([data[at] | 0x0F]) + b"\xff" * 4 + data[at + 5 :]


def rf64_that_announces_too_much(data: bytes) -> bytes:
    """The ds64 chunk: sizes of the file, of the sound, and the number of samples, each in 64 bits."""
    at = data.index(b"ds64") + 8
    return data[:at] + struct.pack("<QQQ", 2**40, 2**40 - 200, 2**39) + data[at + 24 :]


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("pcm16.wav", wav_that_announces_too_much),
        ("float.wav", wav_that_announces_too_much),
        ("a.flac", flac_that_announces_too_much),
        ("big.wav", rf64_that_announces_too_much),
    ],
)
def test_a_header_that_announces_too_much_costs_no_memory(
    name: str, alter: Callable[[bytes], bytes], originals: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(alter(originals[name]))
    tracemalloc.start()
    try:
        read_or_refused(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * MEGABYTE
    finally:
        tracemalloc.stop()
