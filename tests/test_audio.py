"""Audio in and out: each bad input its own error; log-mel against transformers' Whisper front end."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgeomni import audio
from edgeomni.errors import AudioError
from edgeomni.spec import FrontEndSpec

RATE = 16000
TONE = (0.3 * np.sin(np.arange(RATE) * 0.1)).astype(np.float32)


def wav(path: Path, samples: np.ndarray = TONE, rate: int = RATE, **kwargs: str) -> Path:
    soundfile.write(path, samples, rate, **kwargs)
    return path


def cut(path: Path) -> Path:
    whole = wav(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


BAD = {
    "missing": (lambda p: p / "none.wav", "no such sound file"),
    "empty": (lambda p: (p / "a.wav").write_bytes(b"") and None or p / "a.wav", "is empty"),
    "cut": (lambda p: cut(p / "a.wav"), "is cut off.*header announces"),
    "headless": (lambda p: (p / "a.wav").write_bytes(b"RIFF\0\0\0\0WAVE") and p / "a.wav", "before its sound begins"),
    "text": (lambda p: (p / "a.wav").write_text("not sound") and p / "a.wav", "cannot be read as audio"),
    "nan": (lambda p: wav(p / "a.wav", np.full(99, np.nan, np.float32), subtype="FLOAT"), "NaN"),
    "zero length": (lambda p: wav(p / "a.wav", TONE[:0]), "zero length"),
    "silent": (lambda p: wav(p / "a.wav", TONE * 0), "silent"),
    "8 channels": (lambda p: wav(p / "a.wav", np.stack([TONE] * 8, 1)), "8 channels.*--channel N"),
    "raw": (lambda p: (p / "a.raw").write_bytes(bytes(64)) and p / "a.raw", "raw samples have no header"),
    "too loud": (lambda p: wav(p / "a.wav", TONE * 1e19, subtype="FLOAT"), r"peak is 3e\+18"),
    "192 kHz": (lambda p: wav(p / "a.wav", TONE, 192000), "192000 Hz.*sox"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_bad_input_has_its_own_error(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    path = make(tmp_path)  # type: ignore[no-untyped-call]
    with pytest.raises(AudioError, match=message):
        audio.read(path, RATE)


def test_samples_of_other_float_types_are_converted() -> None:
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        got = audio.as_samples(TONE.astype(dtype))
        assert got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_allclose(got, TONE, atol=2e-4)
    assert audio.as_samples(np.stack([TONE, TONE], 1)[:, 0]).flags.c_contiguous


WRONG_SAMPLES = {
    "int16": (np.arange(99, dtype=np.int16), "int16; divide int16 by 32768"),
    "int32": (np.arange(99, dtype=np.int32), "int32; divide int32 by 2147483648"),
    "uint8": (np.arange(99, dtype=np.uint8), "uint8; subtract 128 and divide by 128"),
    "bool": (np.ones(99, bool), "bool; convert to float32"),
    "complex": (np.ones(99, complex), "complex128; convert to float32"),
    "object": (np.array([0.5, None]), "object; convert to float32"),
    "stereo": (np.ones((99, 2), np.float32), r"\(99, 2\); pick a channel"),
    "one row": (np.ones((1, 99), np.float32), r"\(1, 99\); pick a channel"),
    "number": (np.float32(0.5), "NumPy array of samples, got float32"),
    "no dimension": (np.array(0.5), r"shape \[S\], got \(\)"),
    "list": ([0.5, 0.5], "NumPy array of samples, got list"),
    "empty": (np.zeros(0, np.float32), "zero length"),
    "one NaN": (np.where(np.arange(99) == 50, np.nan, 0.5), "NaN"),
    "infinite": (np.where(np.arange(99) == 50, -np.inf, 0.5), "infinite"),
    "huge double": (np.full(99, 1e300), r"peak is 1e\+300"),
    "huge negative": (np.full(99, -1e19, np.float32), r"peak is 1e\+19"),
}


@pytest.mark.parametrize("case", WRONG_SAMPLES)
def test_wrong_samples_are_refused_with_a_remedy(case: str) -> None:
    samples, message = WRONG_SAMPLES[case]
    with pytest.raises(AudioError, match=f"question: .*{message}"):
        audio.as_samples(samples, "question")


@pytest.mark.parametrize(
    ("peak", "message"), [(1e-4, None), (9.9e-5, "silent"), (1e4, None), (-1e4, None), (1.001e4, "peak"), (0, "silent")]
)
def test_the_bounds_of_loudness(peak: float, message: str | None) -> None:
    samples = np.zeros(50)
    samples[20] = peak
    if message is None:
        assert audio.as_samples(samples)[20] == np.float32(peak)
    else:
        with pytest.raises(AudioError, match=message):
            audio.as_samples(samples)


def test_a_long_recording_is_read_in_blocks_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 3000)
    stereo = np.stack([TONE, np.zeros_like(TONE)], 1)
    for name in ("a.wav", "a.flac"):
        np.testing.assert_allclose(audio.read(wav(tmp_path / name, stereo), RATE), TONE / 2, atol=1e-4)
    monkeypatch.setattr(audio, "LONGEST_S", 1)
    assert len(audio.read(wav(tmp_path / "b.wav"), RATE)) == RATE, "exactly as long as is allowed"
    with pytest.raises(AudioError, match="lasts longer than 1 s"):
        audio.read(wav(tmp_path / "b.wav", np.append(TONE, TONE[:1])), RATE)


def test_channels_are_averaged_or_picked(tmp_path: Path) -> None:
    stereo = wav(tmp_path / "a.wav", np.stack([TONE, np.zeros_like(TONE)], 1))
    np.testing.assert_allclose(audio.read(stereo, RATE), TONE / 2, atol=1e-4)
    eight = wav(tmp_path / "b.wav", np.stack([TONE * 0] * 3 + [TONE] + [TONE * 0] * 4, 1))
    np.testing.assert_allclose(audio.read(eight, RATE, channel=3), TONE, atol=1e-4)
    with pytest.raises(AudioError, match="no channel 8"):
        audio.read(eight, RATE, channel=8)


def test_a_streamed_wav_without_a_length_is_read(tmp_path: Path) -> None:
    raw = wav(tmp_path / "a.wav").read_bytes()
    at = raw.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(raw[:at] + struct.pack("<I", 0xFFFFFFFF) + raw[at + 4 :])
    assert len(audio.read(tmp_path / "a.wav", RATE)) == RATE


def test_resampling_keeps_pitch_and_length(tmp_path: Path) -> None:
    t = np.arange(48000) / 48000
    path = wav(tmp_path / "a.wav", (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32), 48000)
    x = audio.read(path, RATE)
    assert abs(len(x) - RATE) <= 1 and np.abs(np.fft.rfft(x)).argmax() == 440


@pytest.mark.parametrize("samples", [90, 201, 4800, 80_000, 479_900, 480_000])
def test_log_mel_is_whispers(samples: int) -> None:
    from transformers import WhisperFeatureExtractor

    x = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    expected = WhisperFeatureExtractor()(x, sampling_rate=RATE, return_tensors="np").input_features[0]
    np.testing.assert_allclose(audio.log_mel(x, FrontEndSpec(), 3000), expected, atol=1e-4)


def test_samples_beyond_full_scale_are_clipped_not_wrapped() -> None:
    pcm = audio.to_pcm16(np.array([-2, -1, 0, 1, 2, 0.5 / 32767], np.float32))
    assert pcm.tolist() == [-32768, -32767, 0, 32767, 32767, 0]
