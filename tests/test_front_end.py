"""What is let in as audio, each guard at its boundary; the log-mel's edges against a plain second implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgeomni import audio
from edgeomni.errors import AudioError
from edgeomni.spec import FrontEndSpec

RATE = 16000
SMALL = FrontEndSpec(sample_rate=8000, n_fft=64, hop=20, n_mels=12, window_s=1)
"""A front end of other sizes: 50 mel frames are 1000 samples."""


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def saved(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


# --- guards


def test_a_peak_of_exactly_the_limit_is_speech() -> None:
    """-80 dBFS, that is 1e-4."""
    peak = np.float32(1e-4)
    for sign in (1, -1):
        samples = np.zeros(100, np.float32)
        samples[50] = sign * peak
        audio.as_samples(samples)
        samples[50] = sign * np.nextafter(peak, np.float32(0))
        with pytest.raises(AudioError, match="is silent"):
            audio.as_samples(samples)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_sample_among_good_ones_is_found(bad: float) -> None:
    samples = noise(100)
    samples[99] = bad
    with pytest.raises(AudioError, match="q: contains NaN or infinite"):
        audio.as_samples(samples, "q")


def test_arrays_that_are_no_mono_recording() -> None:
    audio.as_samples(noise(1))
    with pytest.raises(AudioError, match="zero length"):
        audio.as_samples(np.zeros(0, np.float32))
    with pytest.raises(AudioError, match=r"mono samples.*\(2, 5\)"):
        audio.as_samples(noise(10).reshape(2, 5))


@pytest.mark.parametrize(("rate", "kept"), [(3999, False), (4000, True), (96000, True), (96001, False)])
def test_rates_at_both_ends(rate: int, kept: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.wav", noise(rate // 4), rate)
    if kept:
        assert len(audio.read(path, RATE)) == pytest.approx(RATE // 4, abs=1)
    else:
        with pytest.raises(AudioError, match=f"{rate} Hz"):
            audio.read(path, RATE)


def test_two_channels_are_averaged_and_three_are_refused(tmp_path: Path) -> None:
    left, right, third = noise(400, 1), noise(400, 2), noise(400, 3)
    stereo = saved(tmp_path / "2.wav", np.stack([left, right], 1))
    np.testing.assert_allclose(audio.read(stereo, RATE), (left + right) / 2, atol=1e-7)
    three = saved(tmp_path / "3.wav", np.stack([left, right, third], 1))
    with pytest.raises(AudioError, match="3 channels.*--channel N"):
        audio.read(three, RATE)
    for channel, samples in enumerate((left, right, third)):
        np.testing.assert_array_equal(audio.read(three, RATE, channel), samples)
    for channel in (-1, 3):
        with pytest.raises(AudioError, match=f"no channel {channel}"):
            audio.read(three, RATE, channel)


def test_one_channel_at_the_right_rate_comes_back_as_it_is(tmp_path: Path) -> None:
    samples = noise(400)
    back = audio.read(saved(tmp_path / "a.wav", samples), RATE)
    np.testing.assert_array_equal(back, samples)
    assert back.dtype == np.float32 and back.flags.c_contiguous
    np.testing.assert_array_equal(audio.read(saved(tmp_path / "a.wav", samples), RATE, 0), samples)


@pytest.mark.parametrize("missing", [1, 2, 700])
def test_a_wav_that_lacks_its_end_is_refused(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(400), RATE)
    whole = path.read_bytes()
    assert len(audio.read(path, RATE)) == 400
    path.write_bytes(whole[:-missing])
    with pytest.raises(AudioError, match=f"cut off.*announces 800 bytes.*{800 - missing} are there"):
        audio.read(path, RATE)


@pytest.mark.parametrize("length", [4, 5])
def test_chunks_before_the_sound_are_skipped_with_their_padding(length: int, tmp_path: Path) -> None:
    """RIFF pads chunks of an odd length by one byte."""
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(400), RATE)
    whole = path.read_bytes()
    at = whole.index(b"data")
    extra = b"note" + length.to_bytes(4, "little") + b"x" * (length + length % 2)
    riff = (len(whole) - 8 + len(extra)).to_bytes(4, "little")
    path.write_bytes(whole[:4] + riff + whole[8:at] + extra + whole[at:])
    assert len(audio.read(path, RATE)) == 400
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(AudioError, match="cut off.*announces 800 bytes.*798 are there"):
        audio.read(path, RATE)


@pytest.mark.parametrize("announced", [0, 0xFFFFFFFF])
def test_a_length_that_was_never_known_is_no_cut(announced: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(400), RATE)
    whole = path.read_bytes()
    at = whole.index(b"data") + 4
    path.write_bytes(whole[:at] + announced.to_bytes(4, "little") + whole[at + 4 :])
    audio._refuse_cut_wav(path)


def test_formats_other_than_wav_are_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", noise(400), RATE)
    assert len(audio.read(tmp_path / "a.flac", RATE)) == 400


def test_only_a_riff_wave_is_held_against_its_header(tmp_path: Path) -> None:
    """RF64 is read as well; a RIFF file that is no WAVE is no audio rather than a cut one."""
    soundfile.write(tmp_path / "a.wav", noise(400), RATE, format="RF64")
    assert len(audio.read(tmp_path / "a.wav", RATE)) == 400
    for head in (b"RIFF\0\0\0\0AVI ", b"XXXX\0\0\0\0WAVE"):
        (tmp_path / "b.wav").write_bytes(head + b"data\xff\0\0\0")
        with pytest.raises(AudioError, match="cannot be read as audio"):
            audio.read(tmp_path / "b.wav", RATE)


def test_pcm_is_rounded_and_clipped() -> None:
    samples = np.array([0, 1, -1, 1.5, -1.5, 0.4 / 32767, 0.6 / 32767, -0.6 / 32767], np.float32)
    pcm = audio.to_pcm16(samples)
    assert pcm.tolist() == [0, 32767, -32767, 32767, -32768, 0, 1, -1] and pcm.dtype == np.int16


# --- features


@pytest.mark.parametrize(
    ("samples", "features"),
    [(1, 1), (319, 1), (320, 2), (321, 2), (639, 2), (640, 3), (16000, 51), (480_000 - 1, 1500), (480_000, 1501)],
)
def test_features_per_20_ms_and_one(samples: int, features: int) -> None:
    """int(ms / 20) + 1; at 16 kHz 20 ms are 320 samples."""
    assert audio.feature_count(samples, FrontEndSpec()) == features


def test_features_at_another_rate() -> None:
    assert [audio.feature_count(n, SMALL) for n in (159, 160, 8000)] == [1, 2, 51]


def slow_log_mel(samples: np.ndarray, spec: FrontEndSpec, frames: int) -> np.ndarray:
    """The definition step by step in double precision: pad, mirror both edges, window, DFT, filters, log, clamp."""
    whole = np.zeros(frames * spec.hop)
    whole[: len(samples)] = samples
    half = spec.n_fft // 2
    mirrored = np.concatenate([whole[half:0:-1], whole, whole[-2 : -half - 2 : -1]])
    bins = half + 1
    window = np.array([0.5 * (1 - np.cos(2 * np.pi * i / spec.n_fft)) for i in range(spec.n_fft)])
    dft = np.exp(-2j * np.pi * np.outer(np.arange(bins), np.arange(spec.n_fft)) / spec.n_fft)
    power = np.empty((bins, frames))
    for t in range(frames):
        power[:, t] = np.abs(dft @ (window * mirrored[t * spec.hop : t * spec.hop + spec.n_fft])) ** 2
    log = np.log10(np.maximum(slaney_filters(spec) @ power, 1e-10))
    return np.asarray((np.maximum(log, log.max() - 8) + 4) / 4)


def slaney_filters(spec: FrontEndSpec) -> np.ndarray:
    """Triangles between neighbours of n_mels + 2 points, even on Slaney's scale: linear to 1 kHz, then logarithmic."""

    def to_mel(hz: float) -> float:
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    def to_hz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    points = [to_hz(m) for m in np.linspace(0, to_mel(spec.sample_rate / 2), spec.n_mels + 2)]
    filters = np.zeros((spec.n_mels, spec.n_fft // 2 + 1))
    for i, (low, middle, high) in enumerate(zip(points, points[1:], points[2:], strict=False)):
        for j in range(filters.shape[1]):
            hz = j * spec.sample_rate / spec.n_fft
            slope = (hz - low) / (middle - low) if hz <= middle else (high - hz) / (high - middle)
            filters[i, j] = max(0.0, slope) * 2 / (high - low)
    return filters


@pytest.mark.parametrize("samples", [1, 2, 31, 32, 33, 34, 500, 966, 967, 968, 969, 970, 999, 1000])
def test_log_mel_at_its_edges(samples: int) -> None:
    """Half a window is 32 samples: up to there the left mirror reaches into the padding, from 969 on the right one
    reaches into the sound. 1000 fill the window."""
    x = noise(samples, samples)
    got = audio.log_mel(x, SMALL, 50)
    assert got.shape == (12, 50) and got.dtype == np.float32
    np.testing.assert_allclose(got, slow_log_mel(x, SMALL, 50), atol=2e-5)


def test_log_mel_of_one_sample_too_many_is_refused() -> None:
    with pytest.raises(AudioError, match="1001 samples do not fit a window of 50 mel frames"):
        audio.log_mel(noise(1001), SMALL, 50)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_of_other_band_counts(n_mels: int) -> None:
    spec = FrontEndSpec(n_mels=n_mels)
    x = noise(4000)
    np.testing.assert_allclose(audio.log_mel(x, spec, 40), slow_log_mel(x, spec, 40), atol=5e-5)


def test_log_mel_of_a_rate_below_the_scale_s_bend() -> None:
    """At 1600 Hz every band lies on the linear part of Slaney's scale."""
    spec = FrontEndSpec(sample_rate=1600, n_fft=64, hop=16, n_mels=8, window_s=1)
    x = noise(800)
    np.testing.assert_allclose(audio.log_mel(x, spec, 100), slow_log_mel(x, spec, 100), atol=2e-5)


def test_what_is_quiet_beside_the_loudest_is_floored() -> None:
    """8 in log10 below the maximum, that is 2 below it after the division by 4."""
    x = np.zeros(900, np.float32)
    x[:200] = 5 * noise(200)
    got = audio.log_mel(x, SMALL, 50)
    assert got.min() == pytest.approx(got.max() - 2) and (got[:, 20:] == got.min()).all()
