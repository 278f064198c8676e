"""Hugging Face datasets on disk, laid out as the dataset cards have them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from data_wavs import RATE, tone, wav, wav_bytes

from edgeomni.data.codes import codes_of_text
from edgeomni.data.readers import read_data
from edgeomni.errors import AudioError, DataError

SOUND = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
SNAC = "# 1 2 3 4 5 6 7 # 11 12 13 14 15 16 4095"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(columns: dict[str, list[Any]], *sounds: str) -> Any:
    """A dataset whose `sounds` are columns of the Audio type, from {"bytes", "path"} or None."""
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {name: stored if name in sounds else None for name in columns}
    made = datasets.Dataset.from_dict({name: values for name, values in columns.items() if not features[name]})
    for name in sounds:
        made = made.add_column(name, columns[name], feature=datasets.Features({name: stored})[name])
        made = made.cast_column(name, datasets.Audio())
    return made


def voice_assistant() -> Any:
    return table(
        {
            "split_name": ["identity", "qa_assistant_v1", "qa_assistant_v1"],
            "index": ["0", "1", "2"],
            "round": ["None", "None", "1"],
            "question": ["Who are you?", "Two and two?", "<USER>: Hello. <ASSISTANT>: Good day. <USER>: Go on."],
            "question_audio": [
                {"bytes": wav_bytes(0.1), "path": "0.wav"},
                {"bytes": wav_bytes(0.2), "path": "1.wav"},
                None,
            ],
            "answer": ["I am Omni.", "Four.", "Well."],
            "answer_snac": [SNAC, "# 1 2 3 # 4 5", SNAC],
        },
        "question_audio",
    )


def saved(made: Any, path: Path, kind: str) -> Path:
    if kind == "parquet":
        made.to_parquet(path / "data" / "train-00000-of-00001.parquet")
        return path
    made.save_to_disk(str(path))
    return path if kind == "folder" else next(path.glob("*.arrow"))


@pytest.mark.parametrize("kind", ["folder", "arrow", "parquet"])
def test_voice_assistant(tmp_path: Path, kind: str) -> None:
    (tmp_path / "d" / "data").mkdir(parents=True)
    source = saved(voice_assistant(), tmp_path / "d", kind)
    data = read_data(source)
    assert data.format == "huggingface"
    first, last = data.samples
    assert set(first.tasks()) == {"asr", "at", "aa", "tt", "ta"}
    assert (first.where, first.text, first.answer, first.history) == (f"{source}[0]", "Who are you?", "I am Omni.", ())
    np.testing.assert_array_equal(first.audio[0].read(RATE), tone(0.1))
    assert first.answer_codes is not None and first.answer_codes.dtype == np.int64
    assert first.answer_codes.tolist() == [[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 4095]]
    assert (last.text, last.history, last.audio) == ("Go on.", (("Hello.", "Good day."),), ())
    assert set(last.tasks()) == {"tt", "ta"}
    [fault] = data.faults
    assert fault.where == f"{source}[1]" and "answer_snac holds frames of different lengths" in fault.what


@pytest.mark.parametrize(
    "text", ["", "1 2 3", "1 # 2 3", "# 1 x", "# 1 2 #", "# 1 -2", "#", f"# {'9' * 30}", f"# {'9' * 5000}"]
)
def test_text_that_is_no_codec_frames(text: str) -> None:
    with pytest.raises(DataError, match="answer_snac"):
        codes_of_text(text)


def test_codec_frames_of_any_codec() -> None:
    assert codes_of_text("#1 2 3\n#4 5 6 ").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert codes_of_text("# 8").shape == (1, 1)


def test_align_anything(tmp_path: Path) -> None:
    made = table(
        {
            "prompt": ["What is it?", "What is it?", "What is it?"],
            "audio_path": [{"bytes": wav_bytes(0.3), "path": None}] * 3,
            "response_1": ["A tone."] * 3,
            "response_2": ["A voice."] * 3,
            "score_1": [1, 2, 3],
            "overall_response": [1, 2, 3],
        },
        "audio_path",
    )
    data = read_data(saved(made, tmp_path / "d", "folder"))
    assert [(s.tasks(), s.text, s.answer, s.system) for s in data.samples] == [
        (("at",), "", "A tone.", "What is it?"),
        (("at",), "", "A voice.", "What is it?"),
    ]
    np.testing.assert_array_equal(data.samples[1].audio[0].read(RATE), tone(0.3))
    assert [fault.what for fault in data.faults] == [
        "overall_response is 3; it must say whether response_1 or response_2 is better"
    ]
    written = table({"prompt": ["Two and two?"], "response": ["Four."]})
    [sample] = read_data(saved(written, tmp_path / "t", "folder")).samples
    assert (sample.tasks(), sample.text, sample.answer) == (("tt",), "Two and two?", "Four.")


def test_recordings_beside_the_table(tmp_path: Path) -> None:
    wav(tmp_path / "1.wav", 0.4)
    paths: list[Any] = ["1.wav", "2.wav", None, ""]
    sounds = pyarrow.array([{"bytes": None, "path": path} for path in paths], SOUND)
    made = pyarrow.table({"text": ["one", "two", "three", "four"], "audio": sounds, "speaker": ["ann"] * 4})
    pyarrow.parquet.write_table(made, tmp_path / "d.parquet")
    data = read_data(tmp_path / "d.parquet")
    assert [(sample.tasks(), sample.text, sample.speaker) for sample in data.samples] == [
        (("asr",), "one", "ann"),
        (("asr",), "two", "ann"),
        (("asr",), "four", "ann"),
    ]
    np.testing.assert_array_equal(data.samples[0].audio[0].read(RATE), tone(0.4))
    with pytest.raises(AudioError, match=r"d.parquet\[1\]: audio: 2.wav cannot be read"):
        data.samples[1].audio[0].read(RATE)
    with pytest.raises(AudioError):
        data.samples[2].audio[0].read(RATE)
    assert [fault.where for fault in data.faults] == [f"{tmp_path / 'd.parquet'}[2]"]


def test_columns_of_the_native_format(tmp_path: Path) -> None:
    sound = {"bytes": wav_bytes(0.1), "path": None}
    rows: dict[str, list[Any]] = {
        "task": ["ta", "tts", None],
        "text": ["Hello."] * 3,
        "answer": ["Hello."] * 3,
        "language": ["en"] * 3,
    }
    made = table({**rows, "audio": [sound] * 3, "answer_audio": [sound] * 3}, "audio", "answer_audio")
    data = read_data(saved(made, tmp_path / "d", "folder"))
    assert [len(sample.tasks()) for sample in data.samples] == [1, 5]
    assert data.samples[0].answer_audio is not None and data.samples[0].language == "en"
    np.testing.assert_array_equal(data.samples[0].answer_audio.read(RATE), tone(0.1))
    [fault] = data.faults
    assert fault.what.startswith("task is 'tts'")


def test_sound_is_not_read_before_it_is_wanted(tmp_path: Path) -> None:
    made = table({"text": ["one"], "answer": ["two"], "audio": [{"bytes": b"no sound", "path": None}]}, "audio")
    [sample] = read_data(saved(made, tmp_path / "d", "folder")).samples
    with pytest.raises(AudioError, match=r"d\[0\]: audio"):
        sample.audio[0].read(RATE)


def test_splits_are_chosen_by_the_user(tmp_path: Path) -> None:
    made = voice_assistant().select([0])
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="has the splits test, train; name one of them"):
        read_data(tmp_path / "saved")
    assert len(read_data(tmp_path / "saved" / "test").samples) == 1
    (tmp_path / "p").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        made.to_parquet(tmp_path / "p" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        read_data(tmp_path / "p")
    (tmp_path / "p" / "test-00000-of-00001.parquet").unlink()
    assert len(read_data(tmp_path / "p").samples) == 2


def test_datasets_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = table({"prompt": ["Rain."], "response_1": ["a"], "response_2": ["b"]})
    with pytest.raises(DataError, match="has the columns prompt, response_1, response_2, .*VoiceAssistant-400K"):
        read_data(saved(made, tmp_path / "d", "folder"))
    texts = table({"text": ["Rain."], "audio": ["1.wav"]})
    with pytest.raises(DataError, match="column audio holds no recordings"):
        read_data(saved(texts, tmp_path / "t", "folder"))
    for name in ("d.parquet", "d.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 and no more")
        with pytest.raises(DataError, match=f"{name}: cannot be read as a dataset"):
            read_data(tmp_path / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the datasets package: pip install"):
        read_data(tmp_path / "d")
