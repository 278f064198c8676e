"""Sound files by suffix, read back; pipes and devices; what is refused."""

from __future__ import annotations

import os
import stat
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgeomni import audio
from edgeomni.arrays import F32
from edgeomni.errors import AudioError, UsageError
from edgeomni.sound_writer import SoundWriter

RATE = 24000
SPEECH = (0.4 * np.sin(np.cumsum(0.02 + 0.03 * np.sin(np.arange(RATE) / 900)))).astype(np.float32)


def written(path: Path, *chunks: F32, rate: int = RATE, force: bool = False) -> Path:
    with SoundWriter(path, rate, force=force) as out:
        for chunk in chunks:
            out.write(chunk)
    return path


@pytest.mark.parametrize(
    ("suffix", "kind", "subtype", "error"),
    [
        (".wav", "WAV", "PCM_16", 4e-5),
        (".WAV", "WAV", "PCM_16", 4e-5),
        (".flac", "FLAC", "PCM_16", 4e-5),
        (".ogg", "OGG", "VORBIS", 0.03),
        (".mp3", "MP3", "MPEG_LAYER_III", 0.03),
    ],
)
def test_the_suffix_says_what_is_written(tmp_path: Path, suffix: str, kind: str, subtype: str, error: float) -> None:
    path = written(tmp_path / f"a{suffix}", SPEECH[:5000], SPEECH[5000:5001], SPEECH[5001:])
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.samplerate, info.channels) == (kind, subtype, RATE, 1)
    back, _ = soundfile.read(path, dtype="float32")
    assert back.shape == SPEECH.shape
    assert np.abs(back - SPEECH).max() < error
    assert np.corrcoef(back, SPEECH)[0, 1] > 0.999
    assert os.listdir(tmp_path) == [path.name]


def test_what_is_too_loud_is_clipped_not_wrapped(tmp_path: Path) -> None:
    back, _ = soundfile.read(written(tmp_path / "a.wav", SPEECH * 10))
    np.testing.assert_allclose(back, np.clip(SPEECH * 10, -1, 1), atol=1e-4)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_an_answer_without_sound_is_a_file_that_can_be_read(tmp_path: Path, suffix: str) -> None:
    back, rate = soundfile.read(written(tmp_path / f"a{suffix}"))
    assert rate == RATE and len(back) == (1 if suffix in (".flac", ".mp3") else 0) and not back.any()


def test_a_long_chunk_does_not_crash_the_vorbis_encoder(tmp_path: Path) -> None:
    """libsndfile overflows its stack on 3 million samples in one call."""
    path = written(tmp_path / "a.ogg", np.zeros(3_000_000, np.float32))
    assert soundfile.info(path).frames == 3_000_000


@pytest.mark.parametrize(
    ("suffix", "rate", "said"),
    [
        (".mp3", 12345, "MP3 at 12345 Hz is refused: .*sample rates of 8000.*; write a .wav instead"),
        (".flac", 700_000, "FLAC at 700000 Hz is refused: .*; write a .wav instead"),
        (".ogg", 200_001, "Ogg Vorbis ends at 200000 Hz, and this is 200001 Hz; write a .wav"),
    ],
)
def test_rates_that_a_format_refuses(tmp_path: Path, suffix: str, rate: int, said: str) -> None:
    with pytest.raises(AudioError, match=said):
        written(tmp_path / f"a{suffix}", SPEECH, rate=rate)
    assert os.listdir(tmp_path) == []


def test_the_highest_rate_of_vorbis(tmp_path: Path) -> None:
    assert soundfile.info(written(tmp_path / "a.ogg", SPEECH, rate=200_000)).samplerate == 200_000


@pytest.mark.parametrize("name", ["a.mp4", "a", "a.npz", "a.wav.txt", ".wav"])
def test_other_suffixes_are_refused_with_the_list(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UsageError, match=r"no sound format has the suffix .*; end the name in \.wav, \.flac, \.ogg, \.mp"
    ):
        SoundWriter(tmp_path / name, RATE)
    assert os.listdir(tmp_path) == []


def test_an_old_libsndfile_says_that_it_cannot_write_mp3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "", "FLAC": "", "OGG": ""})
    with pytest.raises(UsageError, match=r"libsndfile .* cannot write \.mp3; end the name in \.wav, \.flac, \.ogg$"):
        SoundWriter(tmp_path / "a.mp3", RATE)


def test_a_sound_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with SoundWriter(tmp_path / "a.wav", RATE) as out:
        out.write(SPEECH)
        assert not (tmp_path / "a.wav").exists()
    with pytest.raises(BrokenPipeError), SoundWriter(tmp_path / "b.wav", RATE) as out:
        out.write(SPEECH)
        raise BrokenPipeError("of the text, not of the sound: it is not the writer's to explain")
    assert os.listdir(tmp_path) == ["a.wav"]


def test_what_exists_or_appears_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(UsageError, match="appeared meanwhile"), SoundWriter(path, RATE) as out:
        out.write(SPEECH)
        path.write_text("mine")
    with pytest.raises(UsageError, match="exists.*--force"):
        SoundWriter(path, RATE)
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["a.wav"]
    assert soundfile.info(written(path, SPEECH, force=True)).frames == len(SPEECH)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: no such directory"):
        SoundWriter(tmp_path / "none" / "a.wav", RATE)
    with pytest.raises(AudioError, match=r"cannot be written \(No space left on device\)"):
        written(Path("/dev/full"), SPEECH)
    with pytest.raises(AudioError, match="cannot be written"):
        written(Path("/proc/a.wav"), SPEECH)


def test_the_umask_holds(tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            path = written(tmp_path / f"{mask}.ogg", SPEECH)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


# --- pipes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipe", "pipe.wav"])
def test_a_pipe_gets_a_wav_as_it_comes(tmp_path: Path, name: str) -> None:
    pipe, got = tmp_path / name, list[bytes]()
    os.mkfifo(pipe)
    came = threading.Event()

    def read() -> None:
        with pipe.open("rb") as f:
            got.append(f.read(44 + 10_000))
            came.set()
            got.append(f.read())

    reader = threading.Thread(target=read)
    reader.start()
    with SoundWriter(pipe, RATE) as out:
        out.write(SPEECH[:5000])
        assert came.wait(60), "what is written comes before the end"
        out.write(SPEECH[5000:])
    reader.join()
    whole = b"".join(got)
    assert whole[:4] == b"RIFF" and whole[8:16] == b"WAVEfmt "
    assert struct.unpack("<IHHIIHH", whole[16:36]) == (16, 1, 1, RATE, 2 * RATE, 2, 16)
    (tmp_path / "copy.wav").write_bytes(whole)
    np.testing.assert_allclose(audio.read(tmp_path / "copy.wav", RATE), SPEECH, atol=4e-5)
    assert soundfile.info(tmp_path / "copy.wav").samplerate == RATE
    assert pipe.is_fifo()


def test_a_reader_that_leaves_is_told(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    left = threading.Event()

    def peek() -> None:
        with pipe.open("rb") as f:
            f.read(1)
        left.set()

    reader = threading.Thread(target=peek)
    reader.start()
    with pytest.raises(AudioError, match="whoever was reading it has left"), SoundWriter(pipe, RATE) as out:
        assert left.wait(60)
        out.write(SPEECH)
    reader.join()


@pytest.mark.parametrize("suffix", [".mp3", ".flac", ".ogg"])
def test_a_pipe_takes_wav_only(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(UsageError, match=f"is a pipe or a device, which takes WAV only.*without {suffix}"):
        SoundWriter(tmp_path / f"pipe{suffix}", RATE)


def test_a_device_is_written_to(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:  # as root in a folder where it could be replaced
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.open("wb").close()
    except PermissionError:
        device = Path(os.devnull)
    written(device, SPEECH)
    written(device, SPEECH, force=True)
    assert device.is_char_device()
