"""EdgeOmni's JSON Lines: every key, faults with file and line, and what is written reads back."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_wavs import RATE, tone, wav, wav_base64, wav_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeomni.arrays import F32
from edgeomni.data.native import write_jsonl
from edgeomni.data.readers import DataSet, read_data
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import AudioError, DataError, UsageError

QUESTION = {"text": "What is two and two?", "answer": "Four."}


def lines(path: Path, *records: dict[str, Any] | str) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def read_lines(path: Path, *records: dict[str, Any] | str, max_bad: int | None = 10) -> DataSet:
    return read_data(lines(path, *records), max_bad=max_bad)


def only(path: Path, **line: Any) -> Sample:
    [sample] = read_lines(path, line).samples
    return sample


def test_every_key(tmp_path: Path) -> None:
    wav(tmp_path / "sounds" / "q.wav", 0.25)
    wav(tmp_path / "a.wav", 0.75)
    sample = only(
        tmp_path / "d.jsonl",
        task="aa",
        audio="sounds/q.wav",
        text="Two and two?",
        answer="Four.",
        answer_audio="a.wav",
        answer_codes=[[1, 2, 3], [4, 5, 6]],
        system="Be brief.",
        language="en",
        speaker="ann",
        history=[["Hello.", "Good day."]],
    )
    assert sample.where == f"{tmp_path / 'd.jsonl'}:1"
    assert (sample.task, sample.tasks(), sample.text, sample.answer) == ("aa", ("aa",), "Two and two?", "Four.")
    assert (sample.system, sample.language, sample.speaker) == ("Be brief.", "en", "ann")
    assert sample.history == (("Hello.", "Good day."),)
    assert len(sample.audio) == 1
    np.testing.assert_array_equal(sample.audio[0].read(RATE), tone(0.25))
    assert sample.answer_audio is not None
    np.testing.assert_array_equal(sample.answer_audio.read(RATE), tone(0.75))
    assert sample.answer_codes is not None and sample.answer_codes.dtype == np.int64
    assert sample.answer_codes.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_line_has_the_tasks_that_its_keys_allow(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    assert only(file, audio="q.wav", text="Hello.").tasks() == ("asr",)
    assert only(file, audio="q.wav", answer="Hello.").tasks() == ("at",)
    assert only(file, **QUESTION).tasks() == ("tt",)
    assert set(only(file, **QUESTION, audio="q.wav", answer_audio="a.wav").tasks()) == {"asr", "at", "aa", "tt", "ta"}
    assert only(file, **QUESTION, audio=None, system=None).system is None


def test_several_recordings_in_every_spelling(tmp_path: Path) -> None:
    wav(tmp_path / "1.wav", 0.1, 0.5)
    clips = only(
        tmp_path / "d.jsonl",
        audio=["1.wav", wav_base64(0.2), f"data:audio/wav;base64,{wav_base64(0.3)}", "1.wav:0.125-0.25", "1.wav:0.25-"],
        answer="Yes.",
    ).audio
    peaks = [float(np.abs(clip.read(RATE)).max()) for clip in clips]
    assert peaks == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.1], rel=1e-2)
    np.testing.assert_array_equal(clips[3].read(RATE), tone(0.1, 0.5)[2000:4000])
    np.testing.assert_array_equal(clips[4].read(RATE), tone(0.1, 0.5)[4000:])


def test_inline_sound_of_other_kinds(tmp_path: Path) -> None:
    flac, streamed = io.BytesIO(), bytearray(wav_bytes(0.5))
    soundfile.write(flac, tone(0.5), RATE, format="FLAC")
    streamed[4:8] = b"\xff\xff\xff\xff"  # a writer that cannot know the length
    for sound in (flac.getvalue(), bytes(streamed)):
        [clip] = only(tmp_path / "d.jsonl", audio=base64.encodebytes(sound).decode(), text="Hello.").audio
        np.testing.assert_allclose(clip.read(RATE), tone(0.5), atol=1e-4)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_one_file(tmp_path: Path, indent: int | None) -> None:
    records = [{"audio": wav_base64(level), "answer": "A tone."} for level in (0.1, 0.2)]
    (tmp_path / "d.json").write_text(json.dumps(records, indent=indent))
    first, second = read_data(tmp_path / "d.json").samples
    assert [one.where.rpartition(":")[2] for one in (first, second)] == (["2", "6"] if indent else ["1", "1"])
    np.testing.assert_array_equal(first.audio[0].read(RATE), tone(0.1))
    np.testing.assert_array_equal(second.audio[0].read(RATE), tone(0.2))


def test_a_file_named_like_a_part_is_the_file(tmp_path: Path) -> None:
    wav(tmp_path / "take:1-2", 0.5)
    [clip] = only(tmp_path / "d.jsonl", audio="take:1-2", text="Hello.").audio
    assert (clip.start_s, clip.end_s) == (0.0, None)
    np.testing.assert_array_equal(clip.read(RATE), tone(0.5))


def test_inline_sound_is_read_from_the_file_when_it_is_wanted(tmp_path: Path) -> None:
    escaped = wav_base64(0.2).replace("/", "\\/")  # as PHP writes JSON
    assert "\\/" in escaped
    file = tmp_path / "d.jsonl"
    text = f'{{"text": "One", "audio": "{wav_base64(0.1)}"}}\n\n  {{"text": "Ünö", "audio": ["x.wav", "{escaped}"]}}\n'
    file.write_text("\ufeff" + text, "utf-8")
    first, second = read_data(file).samples
    assert second.where.endswith(":3")
    np.testing.assert_array_equal(first.audio[0].read(RATE), tone(0.1))
    np.testing.assert_array_equal(second.audio[1].read(RATE), tone(0.2))
    file.write_text(json.dumps({"text": "another file"}) * 3)
    with pytest.raises(AudioError, match="not what it was"):
        first.audio[0].read(RATE)
    file.unlink()
    with pytest.raises(AudioError, match="cannot be read again"):
        second.audio[1].read(RATE)


def test_one_bad_line_among_good_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "d.jsonl"
    with caplog.at_level(logging.WARNING, "edgeomni"):
        data = read_lines(file, QUESTION, QUESTION, '{"text": "cut', QUESTION)
    assert [sample.where for sample in data.samples] == [f"{file}:{n}" for n in (1, 2, 4)]
    assert [fault.where for fault in data.faults] == [f"{file}:3"]
    assert "no JSON" in data.faults[0].what
    [record] = caplog.records
    assert f"{file}:3" in record.getMessage() and record.levelname == "WARNING"
    assert (data.format, data.source) == ("native", str(file))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({**QUESTION, "adio": "1.wav"}, r"unknown key\(s\) \$.adio"),
        ({**QUESTION, "task": "tts"}, r"\$.task: .*tts"),
        ({**QUESTION, "text": 5}, r"\$.text: "),
        ({**QUESTION, "audio": ""}, "audio holds ''"),
        ({**QUESTION, "audio": ["1.wav", "a\0b"]}, r"audio\[1\] holds"),
        ({**QUESTION, "audio": "1.wav:2-1"}, "ends at 1 s, before it begins"),
        ({**QUESTION, "audio": "https://host/1.wav"}, "download"),
        ({**QUESTION, "audio": "data:audio/wav,abc"}, "without ;base64"),
        ({**QUESTION, "audio": "data:;base64,ab*d"}, "base64 does not have"),
        ({**QUESTION, "audio": "!" + wav_base64()}, "too long for a path"),
        ({**QUESTION, "answer_audio": wav_base64()[:-7]}, "answer_audio is cut off: .* 3 character"),
        ({**QUESTION, "answer_codes": [[1, 2], [3]]}, "answer_codes"),
        ({**QUESTION, "answer_codes": [[1, -2]]}, "answer_codes holds -2"),
        ({**QUESTION, "answer_codes": [[1.5, 2]]}, "answer_codes must be"),
        ({**QUESTION, "answer_codes": []}, "answer_codes must be"),
        ({**QUESTION, "answer_codes": [[True, False]]}, "answer_codes must be"),
        ({**QUESTION, "history": [["only one"]]}, r"\$.history"),
        ({"audio": "1.wav"}, "fits no task"),
        ({"task": "aa", "audio": "1.wav", "answer": "Four."}, "task aa needs answer_audio"),
        ("[1]", "holds a list instead of an object"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, line: dict[str, Any] | str, told: str) -> None:
    data = read_lines(tmp_path / "d.jsonl", QUESTION, line, QUESTION)
    assert len(data.samples) == 2
    [fault] = data.faults
    assert fault.where == f"{tmp_path / 'd.jsonl'}:2"

    assert re.search(told, fault.what), fault.what
    assert fault.where not in fault.what


def test_more_faults_than_allowed(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    bad = ["{", "{", "{"]
    assert len(read_lines(file, QUESTION, *bad, max_bad=3).faults) == 3
    with pytest.raises(DataError, match=r"more than 2 records .*d.jsonl:2: .*d.jsonl:3: .*d.jsonl:4: "):
        read_lines(file, QUESTION, *bad, max_bad=2)
    assert len(read_lines(file, QUESTION, *["{"] * 30, max_bad=None).faults) == 30
    with pytest.raises(DataError, match="more than 10"):
        read_lines(file, QUESTION, *["{"] * 11)
    with pytest.raises(DataError, match=r"no sample .*d.jsonl:2: "):
        read_lines(file, {"audio": "1.wav"}, "{", max_bad=None)


def test_a_missing_recording_shows_when_it_is_read(tmp_path: Path) -> None:
    sample = only(tmp_path / "d.jsonl", audio="gone.wav", text="Hello.")
    with pytest.raises(AudioError, match="gone.wav: no such sound file"):
        sample.audio[0].read(RATE)


def test_inline_sound_that_is_cut_off(tmp_path: Path) -> None:

    cut = base64.b64encode(wav_bytes()[:600]).decode()
    sample = only(tmp_path / "d.jsonl", audio=cut, text="Hello.")
    with pytest.raises(AudioError, match="d.jsonl:1: audio: is cut off"):
        sample.audio[0].read(RATE)


def test_several_sources(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", QUESTION), lines(tmp_path / "b.jsonl", "{", QUESTION)
    data = read_data([a, b])
    assert [sample.where for sample in data.samples] == [f"{a}:1", f"{b}:2"]
    assert (data.format, data.source, len(data.faults)) == ("native", f"{a}, {b}", 1)
    with pytest.raises(UsageError, match="no data given"):
        read_data([])


def test_written_samples_read_back(tmp_path: Path) -> None:
    outside, folder = wav(tmp_path / "else" / "1.wav", 0.1), tmp_path / "out"
    inside, odd = wav(folder / "sounds" / "2.wav", 0.2), wav(folder / ("a" * 40) / ("b" * 40), 0.3)
    part, scheme = wav(folder / "t:1-2", 0.4), wav(folder / "data:x" / "1.wav", 0.6)
    samples = [
        Sample("a", "aa", (Clip.of(outside, 0.1 / 3), Clip.of(inside)), "q", "ä\n", Clip.of(inside, 0.01, 0.05)),
        Sample(
            "b", None, (Clip.of(odd), Clip.of(part), Clip.of(scheme)), text="q", system="", language="de", speaker="x"
        ),
        Sample("c", None, (Clip(lambda: wav_bytes(0.5), "memory", 0.01, 0.02),), answer="Four."),
        Sample("d", text="q", answer="a", answer_codes=np.array([[1, 2]]), history=(("x", "y"),), system="s"),
    ]
    write_jsonl(samples, folder / "out.jsonl")
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    assert written[0]["audio"][1] == str(Path("sounds") / "2.wav")
    assert written[0]["audio"][0].startswith(str(outside))
    assert written[1] == {"audio": written[1]["audio"], "text": "q", "system": "", "language": "de", "speaker": "x"}
    back = read_data(folder / "out.jsonl").samples
    assert len(back) == len(samples)
    for one, other in zip(samples, back, strict=True):
        same_fields(one, other)


def same_fields(one: Sample, other: Sample) -> None:
    for name in ("task", "text", "answer", "system", "language", "speaker", "history"):
        assert getattr(one, name) == getattr(other, name), name
    clips = [*one.audio, *([one.answer_audio] if one.answer_audio else [])]
    others = [*other.audio, *([other.answer_audio] if other.answer_audio else [])]
    assert [(c.start_s, c.end_s) for c in clips] == [(c.start_s, c.end_s) for c in others]
    for a, b in zip(clips, others, strict=True):
        np.testing.assert_array_equal(a.read(RATE), b.read(RATE))
    assert (one.answer_codes is None) == (other.answer_codes is None)
    if one.answer_codes is not None and other.answer_codes is not None:
        np.testing.assert_array_equal(one.answer_codes, other.answer_codes)


class LogMel:
    features = (5,)

    def windows(self) -> list[F32]:
        return [np.zeros((80, 10), np.float32)]


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", QUESTION)
    with pytest.raises(UsageError, match="exists"):
        write_jsonl([Sample("a", text="q", answer="a")], file)
    mel = Sample("a.jsonl:1", text="q", mel=LogMel())
    with pytest.raises(DataError, match="a.jsonl:1: has a log-mel and no recording"):
        write_jsonl([Sample("a", text="q", answer="a"), mel], tmp_path / "new.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["task", "audio", "text", "answer", "answer_audio", "answer_codes", "system", "history"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(max_size=30) | st.dictionaries(KEYS, JSON, max_size=4).map(lambda one: json.dumps(one).encode()))
)
def test_any_bytes_are_samples_faults_or_a_data_error(tmp_path: Path, content: list[bytes]) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\n".join(content))
    try:
        data = read_data(file, "native", max_bad=None)
    except DataError as exc:
        assert str(file) in str(exc)
        return
    assert data.samples
    assert len(data.samples) + len(data.faults) <= file.read_bytes().count(b"\n") + 1
