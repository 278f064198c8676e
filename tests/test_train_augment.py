"""Augmentation measured from outside: lengths, powers, spectra, decay; off by default; never silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from edgeomni.errors import AudioError, TrainError
from edgeomni.spec import TokenLayout
from edgeomni.train.augment import AugmentConfig, Augmenter, impulse_response, pink

RATE = 16000


def tone(hz: float = 440.0, seconds: float = 1.0, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def made(**config: Any) -> Augmenter:
    return Augmenter(AugmentConfig(**config))


def power(x: np.ndarray) -> float:
    return float(np.mean(x.astype(np.float64) ** 2))


def loudest_hz(x: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(x * np.hanning(len(x)))).argmax() * RATE / len(x))


def test_by_default_nothing_is_changed() -> None:
    x, mel = tone(), np.random.default_rng(0).standard_normal((80, 50)).astype(np.float32)
    for seed in range(5):
        np.testing.assert_array_equal(made().samples(x, RATE, seed), x)
        np.testing.assert_array_equal(made().mel(mel, 50, seed), mel)


EVERYTHING: dict[str, Any] = {f"{name}_chance": 1.0 for name in ("speed", "room", "noise", "volume", "mel")}


def test_the_same_seed_gives_the_same_again_and_another_something_else() -> None:
    x, mel = tone(), np.random.default_rng(0).standard_normal((80, 200)).astype(np.float32)
    before, mel_before = x.copy(), mel.copy()
    first, again = (made(**EVERYTHING).samples(x, RATE, 7) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, made(**EVERYTHING).samples(x, RATE, 8)[: len(first)])
    np.testing.assert_array_equal(made(**EVERYTHING).mel(mel, 200, 7), made(**EVERYTHING).mel(mel, 200, 7))
    assert not np.array_equal(made(**EVERYTHING).mel(mel, 200, 7), made(**EVERYTHING).mel(mel, 200, 8))
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(mel, mel_before)


@pytest.mark.parametrize("kind", ["speed", "room", "noise", "volume"])
def test_a_chance_is_how_often_it_happens(kind: str) -> None:
    x = tone(seconds=0.05)
    augmenter = made(**{f"{kind}_chance": 0.3})
    changed = sum(not np.array_equal(augmenter.samples(x, RATE, seed), x) for seed in range(400))
    assert 90 < changed < 150  # 120 expected, deviation 9


@pytest.mark.parametrize(("speed", "hz", "seconds"), [(0.8, 352, 1.25), (1.25, 550, 0.8), (1.0, 440, 1.0)])
def test_speed_changes_tempo_and_pitch_alike(speed: float, hz: float, seconds: float) -> None:
    out = made(speed_chance=1, speed=(speed, speed)).samples(tone(), RATE, 0)
    assert abs(len(out) - seconds * RATE) <= 1 and abs(loudest_hz(out) - hz) < 2
    assert out.dtype == np.float32


def test_speeds_fill_their_range() -> None:
    lengths = [len(made(speed_chance=1).samples(tone(), RATE, seed)) / RATE for seed in range(60)]
    assert 1 / 1.1 - 1e-3 <= min(lengths) < 0.93 and 1.09 < max(lengths) <= 1 / 0.9 + 1e-3


def test_speed_leaves_room_in_the_window() -> None:
    augmenter = made(speed_chance=1, speed=(0.5, 0.6))
    assert len(augmenter.samples(tone(), RATE, 0, longest=17000)) == pytest.approx(17000, abs=1)
    assert len(augmenter.samples(tone(), RATE, 0, longest=17000)) <= 17000
    full = augmenter.samples(tone(), RATE, 0, longest=16000)
    assert len(full) == 16000 and loudest_hz(full) == pytest.approx(440, abs=2)  # not slowed down and cut off
    assert len(augmenter.samples(tone(), RATE, 0)) > 25000


@pytest.mark.parametrize("snr", [0.0, 10.0, 30.0])
def test_noise_has_the_power_asked_for(snr: float) -> None:
    x = tone()
    for seed in range(6):
        noise = made(noise_chance=1, noise_snr_db=(snr, snr)).samples(x, RATE, seed) - x
        assert 10 * np.log10(power(x) / power(noise)) == pytest.approx(snr, abs=0.01)


def test_noise_is_white_or_pink() -> None:
    """Power of an octave over that of the one below: doubled for white noise, the same for pink noise."""

    def rise(noise: np.ndarray) -> float:
        spectrum = np.abs(np.fft.rfft(noise)) ** 2
        return float(spectrum[2000:4000].sum() / spectrum[1000:2000].sum())

    x = tone()
    rises = [rise(made(noise_chance=1).samples(x, RATE, seed) - x) for seed in range(30)]
    kinds = [("white" if r > 1.5 else "pink") for r in rises]
    assert 5 < kinds.count("white") < 25
    for kind, expected in (("white", 2.0), ("pink", 1.0)):
        assert np.mean([r for r, k in zip(rises, kinds, strict=True) if k == kind]) == pytest.approx(expected, rel=0.05)
    assert abs(pink(1000, np.random.default_rng(0)).mean()) < 1e-12


def test_recordings_of_noise_are_used_and_repeated(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "hum.wav", tone(1000, 0.25), RATE)
    (tmp_path / "notes.txt").write_text("no sound")
    augmenter = made(noise_chance=1, noise_folder=str(tmp_path), noise_snr_db=(20, 20))
    x = tone(440, 1.0)
    hummed = [noise for seed in range(30) if loudest_hz(noise := augmenter.samples(x, RATE, seed) - x) == 1000]
    assert 3 < len(hummed) < 20
    period = round(0.25 * RATE)
    np.testing.assert_allclose(hummed[0][:period], hummed[0][period : 2 * period], atol=1e-6)
    assert 10 * np.log10(power(x) / power(hummed[0])) == pytest.approx(20, abs=0.01)


def test_noise_folders_that_help_nobody_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no such folder"):
        made(noise_folder=str(tmp_path / "nowhere"))
    with pytest.raises(TrainError, match="holds no sound file"):
        made(noise_folder=str(tmp_path))
    (tmp_path / "bad.wav").write_bytes(b"RIFF, but not really")
    augmenter = made(noise_chance=1, noise_folder=str(tmp_path))
    with pytest.raises(AudioError, match=r"bad\.wav"):
        for seed in range(30):
            augmenter.samples(tone(), RATE, seed)


def test_a_room_decays_by_60_db_in_its_time() -> None:
    response = impulse_response(RATE, 0.4, 6.0, np.random.default_rng(0))
    assert response[0] == 1 and len(response) == 6400
    assert 10 * np.log10(1 / np.sum(response[1:] ** 2)) == pytest.approx(6)
    levels = 10 * np.log10([power(response[1 + i : 1 + i + 640]) for i in range(0, 6400 - 640, 640)])
    slope = np.polyfit(np.arange(len(levels)) * 640 / RATE, levels, 1)[0]
    assert slope == pytest.approx(-60 / 0.4, rel=0.03)


def test_a_room_keeps_power_and_length_and_rings_on_after_a_click() -> None:
    click = np.zeros(RATE, np.float32)
    click[4000] = 0.9
    out = made(room_chance=1, room_rt60_s=(0.2, 0.2), room_direct_db=(3.0, 3.0)).samples(click, RATE, 0)
    assert len(out) == RATE and power(out) == pytest.approx(power(click), rel=1e-4)
    assert np.abs(out[:4000]).max() < 1e-6 and power(out[4001:5000]) > 1e3 * power(out[6500:7200]) > 0
    assert 10 * np.log10(out[4000] ** 2 / np.sum(out[4001:] ** 2)) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("peak", "gain_db", "expected"),
    [(0.1, 6.0, 0.1 * 10**0.3), (0.1, -20.0, 0.01), (0.8, 6.0, 1.0), (0.5, -200.0, 1e-3), (5e-4, -6.0, 5e-4)],
)
def test_volume_neither_clips_nor_silences(peak: float, gain_db: float, expected: float) -> None:
    x = tone(peak=peak)
    out = made(volume_chance=1, volume_db=(gain_db, gain_db)).samples(x, RATE, 0)
    assert np.abs(out).max() == pytest.approx(np.abs(x).max() / peak * expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_the_shortest_recordings_survive_everything(count: int) -> None:
    for seed in range(40):
        for x in (np.full(count, 2e-4, np.float32), np.eye(1, count, dtype=np.float32)[0]):
            out = made(**EVERYTHING, speed=(0.5, 2.0), volume_db=(-60.0, 60.0)).samples(x, RATE, seed)
            assert len(out) >= 1 and np.isfinite(out).all() and np.abs(out).max() >= 1e-4


def test_a_single_sample_is_changed_too() -> None:
    out = made(volume_chance=1, volume_db=(-6.0, -6.0)).samples(np.ones(1, np.float32), RATE, 0)
    assert out.tolist() == pytest.approx([10**-0.3])


def test_silence_is_refused() -> None:
    with pytest.raises(AudioError, match="silent"):
        made().samples(np.zeros(100, np.float32), RATE, 0)


def test_masks_are_those_of_the_papers_mild_policy() -> None:
    """Table 1 of arXiv 1904.08779, SM: F 15, m_F 2, T 70, p 0.2, m_T 2."""
    c = AugmentConfig()
    policy = (c.frequency_width, c.frequency_masks, c.time_width, c.time_share, c.time_masks)
    assert policy == (15, 2, 70, 0.2, 2)


def masked(out: np.ndarray, mel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole bands and whole frames that were replaced."""
    changed = out != mel
    return changed.all(1), changed.all(0)


def test_masks_cover_whole_bands_and_frames_with_the_mean() -> None:
    mel = np.random.default_rng(0).standard_normal((80, 300)).astype(np.float32)
    mel[:, 250:] = -9
    augmenter = made(mel_chance=1, time_masks=1, time_width=40, frequency_masks=1, frequency_width=10)
    widths: tuple[list[int], list[int]] = ([], [])
    for seed in range(80):
        out = augmenter.mel(mel, 250, seed)
        np.testing.assert_array_equal(out[:, 250:], mel[:, 250:])
        bands, frames = masked(out[:, :250], mel[:, :250])
        expected = np.where(bands[:, None] | frames[None], mel[:, :250].mean(), mel[:, :250])
        np.testing.assert_allclose(out[:, :250], expected, rtol=1e-6)
        for which, found in zip((bands, frames), widths, strict=True):
            places = np.flatnonzero(which)
            assert len(places) == 0 or places[-1] - places[0] + 1 == len(places)
            found.append(len(places))
    assert set(widths[0]) == set(range(11))
    assert min(widths[1]) <= 2 and 38 <= max(widths[1]) <= 40


def test_masks_reach_both_ends() -> None:
    mel = np.random.default_rng(0).standard_normal((8, 10)).astype(np.float32)
    augmenter = made(mel_chance=1, time_masks=1, time_share=1.0, frequency_masks=1, frequency_width=2)
    reached = [masked(augmenter.mel(mel, 10, seed), mel) for seed in range(300)]
    assert np.any([bands for bands, _ in reached], 0).all() and np.any([frames for _, frames in reached], 0).all()


def test_a_mask_covers_its_share_at_most_and_all_of_them_leave_something() -> None:
    mel = np.random.default_rng(0).standard_normal((80, 100)).astype(np.float32)
    shares = [masked(made(mel_chance=1, time_masks=1).mel(mel, 100, seed), mel)[1].sum() for seed in range(100)]
    assert max(shares) == 20
    greedy = made(mel_chance=1, time_masks=9, time_width=999, time_share=1, frequency_masks=9, frequency_width=99)
    for seed in range(50):
        assert (greedy.mel(mel, 100, seed) == mel).any()
        assert np.isfinite(greedy.mel(mel[:, :1], 1, seed)).all() and np.isfinite(greedy.mel(mel, 0, seed)).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"noise_chance": 1.5}, "noise_chance is 1.5"),
        ({"speed_chance": -0.1}, "speed_chance"),
        ({"mel_chance": float("nan")}, "mel_chance"),
        ({"time_share": 2}, "time_share"),
        ({"speed": (1.1, 0.9)}, "lower end first"),
        ({"speed": (0.1, 1.0)}, "speed"),
        ({"speed": (1.0, 3.0)}, "speed"),
        ({"room_rt60_s": (0.0, 1.0)}, "above 0 seconds"),
        ({"noise_snr_db": (0.0, float("inf"))}, "noise_snr_db"),
        ({"time_masks": -1}, "time_masks"),
        ({"frequency_width": -1}, "frequency_width"),
    ],
)
def test_values_that_make_no_sense_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        AugmentConfig(**config)


def test_codes_alone_are_drawn_anew_and_as_many_as_asked_for() -> None:
    layout = TokenLayout(text_vocab=100, audio_vocab=80, codebook_size=16, streams=3)
    rng = np.random.default_rng(0)
    own = rng.integers(0, 18, (3, 4000))  # 16 and 17 are special ids
    ids = np.concatenate([own + [[100], [180], [260]], rng.integers(0, 100, (1, 4000))]).astype(np.int32)
    before = ids.copy()
    out = Augmenter(AugmentConfig(code_share=0.5)).codes(ids, layout, seed=3)
    assert (ids == before).all()
    assert (out[3] == ids[3]).all() and (out[:3][own >= 16] == ids[:3][own >= 16]).all()
    for stream, first in enumerate((100, 180, 260)):
        new = out[stream] - first
        assert new.min() >= 0 and new[own[stream] < 16].max() == 15
        changed = (out[stream] != ids[stream])[own[stream] < 16].mean()
        assert changed == pytest.approx(0.5 * 15 / 16, abs=0.03)  # one draw in 16 is the code that was there


def test_codes_stay_without_a_share_and_follow_the_seed() -> None:
    layout = TokenLayout(text_vocab=100, audio_vocab=80, codebook_size=16, streams=3)
    ids = np.tile(np.array([[103], [190], [265], [7]], np.int32), (1, 200))
    assert (Augmenter(AugmentConfig()).codes(ids, layout, seed=1) == ids).all()
    changing = Augmenter(AugmentConfig(code_share=0.3))
    assert (changing.codes(ids, layout, seed=1) == changing.codes(ids, layout, seed=1)).all()
    assert (changing.codes(ids, layout, seed=1) != changing.codes(ids, layout, seed=2)).any()


def test_a_written_recording_has_its_ids_in_order_with_gaps_before_each_and_after_the_last() -> None:
    layout = TokenLayout(text_vocab=100, audio_vocab=20, codebook_size=10, streams=2, text_specials=8)
    gaps: list[set[int]] = [set(), set(), set(), set()]
    for seed in range(300):
        row = made(written_chance=1.0, written_gap=(1.0, 3.0)).written([11, 12, 12], layout, seed, longest=15)
        assert row is not None and row.dtype == np.int32
        assert [i for i in row.tolist() if i != layout.pad_t] == [11, 12, 12]
        for found, run in zip(gaps, "".join("." if i == layout.pad_t else "x" for i in row).split("x"), strict=True):
            found.add(len(run))
    assert gaps == [{1, 2, 3}] * 4


def test_a_written_recording_without_gaps_is_its_ids() -> None:
    layout = TokenLayout(text_vocab=100, audio_vocab=20, codebook_size=10, streams=2, text_specials=8)
    row = made(written_chance=1.0, written_gap=(0.0, 0.0)).written([11, 12], layout, 1, longest=2)
    assert row is not None and row.tolist() == [11, 12]


def test_what_is_too_long_or_empty_is_not_written() -> None:
    layout = TokenLayout(text_vocab=100, audio_vocab=20, codebook_size=10, streams=2, text_specials=8)
    writing = made(written_chance=1.0, written_gap=(2.0, 2.0))
    assert writing.written([11, 12], layout, 1, longest=7) is None  # 2 + 1 + 2 + 1 + 2 = 8 frames
    assert writing.written([11, 12], layout, 1, longest=8) is not None
    assert writing.written([], layout, 1, longest=8) is None


def test_how_often_recordings_are_written() -> None:
    layout = TokenLayout(text_vocab=100, audio_vocab=20, codebook_size=10, streams=2, text_specials=8)
    writing = made(written_chance=0.25)
    written = [writing.written([11], layout, seed, 200) is not None for seed in range(2000)]
    assert 0.2 < np.mean(written) < 0.3
    assert not any(made().written([11], layout, seed, 200) is not None for seed in range(50))
