"""Formats are told by their content; Kaldi folders; whatever a file holds, it gives samples, faults or a DataError."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_wavs import RATE, tone, wav
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeomni.data.readers import READERS, read_data
from edgeomni.errors import AudioError, DataError, UsageError

TURNS = [{"role": "user", "content": "<audio>Hello."}, {"role": "assistant", "content": "Good day."}]
SHAREGPT = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Good day."}]
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("native", {"text": "Hello.", "answer": "Good day."}),
    ("native", {"audio": "1.wav", "text": "Hello.", "task": "asr"}),
    ("minicpm", {"id": "0", "audio": "1.wav", "conversations": TURNS}),
    ("llama-factory", {"audios": ["1.wav"], "messages": TURNS}),
    ("llama-factory", {"conversations": SHAREGPT}),
    ("llama-factory", {"instruction": "Hello.", "input": "", "output": "Good day."}),
    (
        "slam-omni",
        {"key": "1", "source_wav": "1.wav", "source_text": "Hello.", "target_wav": "2.wav", "target_text": "Yes."},
    ),
]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(("name", "record"), EXAMPLES)
def test_formats_are_told_by_their_records(tmp_path: Path, name: str, record: dict[str, Any], as_list: bool) -> None:
    file = tmp_path / "data"  # the file's name says nothing
    broken = "[1]" if as_list else "{"
    file.write_text(f"[{broken}, {json.dumps(record)}]" if as_list else f"{broken}\n{json.dumps(record)}\n")
    data = read_data(file)
    assert (data.format, len(data.samples), len(data.faults)) == (name, 1, 1)
    assert read_data(file, name).samples[0].tasks() == data.samples[0].tasks()


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    file, folder = tmp_path / "d.jsonl", tmp_path / "folder"
    folder.mkdir()
    file.write_text('{"adio": "1.wav", "txt": "Hello."}\n')
    for source, seen in ((file, "has the keys adio, txt"), (folder, "is a folder")):
        with pytest.raises(DataError, match=f"{source}: its format is not known; it {seen}") as caught:
            read_data(source)
        assert all(f"\n  {name}: " in str(caught.value) for name in READERS)
    file.write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match="holds no JSON objects"):
        read_data(file)


def test_what_is_no_data(tmp_path: Path) -> None:
    sources: list[tuple[str | Path, type[Exception], str]] = [
        (tmp_path / "gone.jsonl", DataError, "no such file"),
        ("", UsageError, "cannot be the name"),
        ("a\0b", UsageError, "cannot be the name"),
    ]
    for source, error, what in sources:
        with pytest.raises(error, match=what):
            read_data(source)
    with pytest.raises(UsageError, match="unknown format 'csv'; known are kaldi"):
        read_data(tmp_path, "csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_data(tmp_path, "native")
    broken = tmp_path / "d.json"
    broken.write_text('[{"audio": "1.wav", "text": "Hello."},\n {"audio": ]')
    with pytest.raises(DataError, match=r"d.json: is no JSON list .*byte 50.*; write one object to a line"):
        read_data(broken)


def test_a_format_that_is_insisted_on(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"audio": "1.wav", "text": "Hello."}\n')
    assert read_data(file, "minicpm").format == "minicpm"
    with pytest.raises(DataError, match="no sample"):
        read_data(file, "slam-omni")


# CosyVoice's folders


def kaldi(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_kaldi(tmp_path: Path) -> None:
    far = wav(tmp_path / "else where" / "2.wav", 0.2)
    folder = kaldi(
        tmp_path / "train",
        wav_scp=f"1_a wavs/1.wav\n1_b {far}\n2_c gone.wav\n",
        text="1_a Hello there.\n1_b Good  day.\n2_c Yes.\n",
        utt2spk="1_a 1\n1_b 1\n2_c 2\n",
        spk2utt="1 1_a 1_b\n2 2_c\n",
    )
    wav(folder / "wavs" / "1.wav", 0.1)
    data = read_data(folder)
    assert data.format == "kaldi" and not data.faults
    told = [(s.where, s.tasks(), s.text, s.answer, s.speaker) for s in data.samples]
    scp = folder / "wav.scp"
    assert told == [
        (f"{scp}:1", ("asr",), "Hello there.", "", "1"),
        (f"{scp}:1", ("ta",), "Hello there.", "Hello there.", "1"),
        (f"{scp}:2", ("asr",), "Good  day.", "", "1"),
        (f"{scp}:2", ("ta",), "Good  day.", "Good  day.", "1"),
        (f"{scp}:3", ("asr",), "Yes.", "", "2"),
        (f"{scp}:3", ("ta",), "Yes.", "Yes.", "2"),
    ]
    asr, ta = data.samples[2:4]
    assert ta.answer_audio is not None and not ta.audio and asr.answer_audio is None
    np.testing.assert_array_equal(asr.audio[0].read(RATE), tone(0.2))
    np.testing.assert_array_equal(ta.answer_audio.read(RATE), tone(0.2))
    with pytest.raises(AudioError, match="gone.wav"):
        data.samples[4].audio[0].read(RATE)


def test_kaldi_paths_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kaldi(
        tmp_path / "train", wav_scp="u here.wav\nv both.wav\n", text="u Hello.\nv Hello.\n", spk2utt="ann u v\n"
    )
    wav(tmp_path / "here.wav", 0.1), wav(tmp_path / "both.wav", 0.2), wav(folder / "both.wav", 0.3)
    monkeypatch.chdir(tmp_path)
    first, _, second, _ = read_data("train").samples
    np.testing.assert_array_equal(first.audio[0].read(RATE), tone(0.1))
    np.testing.assert_array_equal(second.audio[0].read(RATE), tone(0.3))
    assert first.speaker == "ann"


def test_kaldi_lines_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = kaldi(
        tmp_path / "train",
        wav_scp="a a.wav\nb sph2pipe b.sph |\nc c.wav\n\nd\na again.wav\ne e.wav\n",
        text="a Hello.\nb Hello.\ne Hello.\nf Hello.\n",
        utt2spk="a 1\nb 1\nf 1\n",
    )
    (folder / "text").write_bytes((folder / "text").read_bytes() + b"g \xff\n")
    with caplog.at_level(logging.WARNING, "edgeomni"):
        data = read_data(folder)
    assert [sample.task for sample in data.samples] == ["asr", "ta"]
    assert [str(fault).removeprefix(f"{folder}/") for fault in data.faults] == [
        "wav.scp:5: must be a name, a space and a value",
        "wav.scp:6: a stands here a second time",
        "text:5: is not UTF-8",
        "wav.scp:2: b comes from a command, and EdgeOmni runs none; write the sound to a file first",
        f"wav.scp:3: c has no line in {folder / 'text'}",
        f"wav.scp:7: e has no line in {folder / 'utt2spk'}",
        f"text:4: f has no line in {folder / 'wav.scp'}",
    ]
    [record] = caplog.records
    assert record.getMessage().startswith("7 record(s)") and record.getMessage().endswith("; and 4 more")


# whatever a file holds

WORDS = st.sampled_from(["<audio>", "user", "gpt", "<USER>: a", "<ASSISTANT>: b", "1.wav", "1.wav:1-2", "data:,", ""])
VALUES = st.recursive(
    WORDS | st.none() | st.integers(-1, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "from", "value", "<audio_00>"), inner))
    ),
    max_leaves=8,
)
ALL_KEYS = sorted({key for _, record in EXAMPLES for key in record} | {"history", "system", "image", "answer_audio"})
RECORDS = st.dictionaries(st.sampled_from(ALL_KEYS), VALUES, max_size=5).map(lambda one: json.dumps(one).encode())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(RECORDS | st.binary(max_size=12), max_size=4),
    st.sampled_from([b"%s", b"[%s]", b"\xef\xbb\xbf[\n%s ]", b"[%s"]),
    st.sampled_from([None, "native", "minicpm", "llama-factory", "slam-omni"]),
)
def test_any_content_gives_samples_faults_or_a_data_error(
    tmp_path: Path, records: list[bytes], frame: bytes, name: str | None
) -> None:
    file = tmp_path / "d"
    file.write_bytes(frame % (b"\n" if frame == b"%s" else b",\n").join(records))
    try:
        data = read_data(file, name, max_bad=None)
    except DataError as exc:
        assert str(file) in str(exc)
        return
    places = [sample.where for sample in data.samples] + [fault.where for fault in data.faults]
    assert data.samples and all(sample.tasks() for sample in data.samples)
    assert all(place.startswith(f"{file}:") for place in places)


def test_a_line_of_blanks_that_only_text_knows_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "text").write_text("a said\n")
    (tmp_path / "utt2spk").write_bytes(b"\x1c\na b\n")
    data = read_data(tmp_path, max_bad=None)
    assert [fault.where for fault in data.faults] == [f"{tmp_path / 'utt2spk'}:1"] and data.samples


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({name: st.binary(max_size=20) for name in ("wav.scp", "text", "utt2spk")}))
def test_any_kaldi_folder_gives_samples_faults_or_a_data_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    try:
        assert read_data(tmp_path, max_bad=None).samples
    except DataError as exc:
        assert str(tmp_path) in str(exc)
