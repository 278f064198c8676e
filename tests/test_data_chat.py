"""Data of MiniCPM and LLaMA-Factory, in files laid out by hand as those projects document them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_wavs import RATE, wav, wav_base64

from edgeomni.data.readers import read_data
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import DataError


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False))
    return path


def heard(clips: tuple[Clip, ...]) -> list[float]:
    return [round(float(np.abs(clip.read(RATE)).max()), 2) for clip in clips]


def told(sample: Sample) -> tuple[Any, ...]:
    return (sample.tasks(), sample.text, sample.answer, sample.system, sample.history)


# MiniCPM

CONVERSATION = [
    {"role": "user", "content": "<audio>\nWhat do you hear?"},
    {"role": "assistant", "content": "A tone."},
]


def test_minicpm_conversations(tmp_path: Path) -> None:
    wav(tmp_path / "path" / "to" / "1.wav", 0.1)
    records = [
        {"id": "0", "audio": "path/to/1.wav", "conversations": CONVERSATION},
        {"id": "1", "audio": wav_base64(0.2), "conversations": CONVERSATION},
        {
            "id": "2",
            "audio": {"<audio_00>": wav_base64(0.3), "<audio_01>": "path/to/1.wav"},
            "conversations": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Say <audio_01> as <audio_00> would."},
                {"role": "assistant", "content": "Hello."},
            ],
        },
        {"id": "3", "audio": ["path/to/1.wav", wav_base64(0.4)], "conversations": [*CONVERSATION[1:]]},
        {
            "id": "4",
            "audio": ["path/to/1.wav", wav_base64(0.4)],
            "conversations": [{"role": "user", "content": ""}, {"role": "assistant", "content": "Two tones."}],
        },
    ]
    data = read_data(write(tmp_path / "train.json", records))
    assert data.format == "minicpm"
    assert [told(sample) for sample in data.samples] == [
        (("at",), "", "A tone.", "What do you hear?", ()),
        (("at",), "", "A tone.", "What do you hear?", ()),
        (("at",), "", "Hello.", "Be brief.\nSay as would.", ()),
        (("at",), "", "Two tones.", None, ()),
    ]
    assert [heard(sample.audio) for sample in data.samples] == [[0.1], [0.2], [0.1, 0.3], [0.1, 0.4]]
    [fault] = data.faults  # the fourth record has no question
    line = next(n for n, one in enumerate((tmp_path / "train.json").read_text().splitlines(), 1) if '"3"' in one) - 1
    assert fault.where == f"{tmp_path / 'train.json'}:{line}" and "by turns" in fault.what


def test_minicpm_audio_and_text(tmp_path: Path) -> None:
    records = [
        {"audio": wav_base64(0.2), "text": "one tone"},
        {"audio": [wav_base64(0.3), wav_base64(0.4)], "text": "two tones"},
    ]
    assert len(read_data(write(tmp_path / "train.json", records)).samples) == 2  # the native format has them too
    data = read_data(tmp_path / "train.json", "minicpm")
    assert [(sample.tasks(), sample.text) for sample in data.samples] == [
        (("asr",), "one tone"),
        (("asr",), "two tones"),
    ]
    assert [heard(sample.audio) for sample in data.samples] == [[0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"image": "a.jpg", "conversations": CONVERSATION}, "has image"),
        ({"conversations": CONVERSATION}, "more tags for recordings than recordings"),
        ({"audio": ["1.wav", "2.wav"], "conversations": CONVERSATION}, "1 recording.s. that no tag stands for"),
        ({"audio": "1.wav", "conversations": CONVERSATION[::-1]}, "by turns"),
        ({"audio": "1.wav", "conversations": CONVERSATION * 2}, "more tags"),
        (
            {
                "audio": "1.wav",
                "conversations": [
                    *CONVERSATION,
                    {"role": "user", "content": "And?"},
                    {"role": "assistant", "content": "No"},
                ],
            },
            "turn 2 follows a spoken one",
        ),
        ({"text": "Hello."}, "needs audio, and text"),
        ({"audio": "1.wav", "conversations": [*CONVERSATION, "Hello."]}, "list of objects"),
        ({"audio": "1.wav", "conversations": "Hello."}, "list of objects"),
    ],
)
def test_minicpm_records_that_cannot_be_used(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    good = {"audio": "1.wav", "conversations": CONVERSATION}
    with pytest.raises(DataError, match=f"train.json:[0-9]+: .*{what}"):
        read_data(write(tmp_path / "train.json", [good, record, good]), "minicpm", max_bad=0)


# LLaMA-Factory

AUDIO_DEMO: dict[str, Any] = {
    "messages": [
        {"content": "<audio>What's that sound?", "role": "user"},
        {"content": "It is a tone.", "role": "assistant"},
    ],
    "audios": ["mllm_demo_data/1.wav"],
}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def test_llama_factory_audios(tmp_path: Path) -> None:
    wav(tmp_path / "mllm_demo_data" / "1.wav", 0.1)
    file = write(tmp_path / "mllm_audio_demo.json", [AUDIO_DEMO])
    expected = (("at",), "", "It is a tone.", "What's that sound?", ())
    data = read_data(file)
    assert data.format == "llama-factory"
    assert [told(sample) for sample in data.samples] == [expected]
    description = {
        "file_name": "mllm_audio_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "audios": "audios"},
        "tags": OPENAI_TAGS,
    }
    info = write(tmp_path / "dataset_info.json", {"mllm_audio_demo": description})
    for source in (file, tmp_path, info, tmp_path / "mllm_audio_demo"):
        data = read_data(source)
        assert data.format == "llama-factory"
        assert [told(sample) for sample in data.samples] == [expected]
        assert heard(data.samples[0].audio) == [0.1]


def test_llama_factory_sharegpt(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", 0.1), wav(tmp_path / "b.wav", 0.2)
    record = {
        "conversations": [
            {"from": "human", "value": "Hello."},
            {"from": "gpt", "value": "Good day."},
            {"from": "human", "value": "Compare <audio> and <audio>."},
            {"from": "gpt", "value": "The second is louder."},
        ],
        "system": "Be brief.",
        "audios": ["a.wav", "b.wav"],
    }
    data = read_data(write(tmp_path / "d.json", [record]))
    assert data.format == "llama-factory"
    assert [told(sample) for sample in data.samples] == [
        (("tt",), "Hello.", "Good day.", "Be brief.", ()),
        (("at",), "", "The second is louder.", "Be brief.\nCompare and .", (("Hello.", "Good day."),)),
    ]
    assert [sample.where for sample in data.samples] == [f"{tmp_path / 'd.json'}:2 turn {n}" for n in (1, 2)]
    assert heard(data.samples[1].audio) == [0.1, 0.2]


def test_llama_factory_alpaca(tmp_path: Path) -> None:
    record = {
        "instruction": "Translate into German.",
        "input": "Good day.",
        "output": "Guten Tag.",
        "system": "You translate.",
        "history": [["Who are you?", "A translator."]],
    }
    data = read_data(write(tmp_path / "d.json", [record]))
    assert data.format == "llama-factory"
    assert [told(sample) for sample in data.samples] == [
        (("tt",), "Who are you?", "A translator.", "You translate.", ()),
        (
            ("tt",),
            "Translate into German.\nGood day.",
            "Guten Tag.",
            "You translate.",
            (("Who are you?", "A translator."),),
        ),
    ]


def test_llama_factory_columns_and_tags_of_the_description(tmp_path: Path) -> None:
    alpaca = {"q": "Two and two?", "a": "Four.", "p": "Count.", "input": "not a column", "sound": ["1.wav"]}
    chat = {
        "talk": [{"who": "boss", "says": "Be brief."}, {"who": "me", "says": "<audio>"}, {"who": "it", "says": "No."}]
    }
    (tmp_path / "sub").mkdir()
    wav(tmp_path / "1.wav", 0.3)
    write(tmp_path / "sub" / "a.json", [alpaca | {"q": "<audio>Two and two?"}])
    (tmp_path / "c.jsonl").write_text(json.dumps(chat | {"snd": "1.wav"}) + "\n")
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it", "system_tag": "boss"}
    columns = {"prompt": "q", "response": "a", "system": "p", "audios": "sound"}
    info = {
        "counting": {"file_name": "sub/a.json", "columns": columns},
        "talking": {
            "file_name": "c.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "audios": "snd"},
            "tags": tags,
        },
        "identity": {"hf_hub_url": "somebody/identity"},
    }
    write(tmp_path / "dataset_info.json", info)
    data = read_data(tmp_path)
    assert [told(sample) for sample in data.samples] == [
        (("at",), "", "Four.", "Count.\nTwo and two?", ()),
        (("at",), "", "No.", "Be brief.", ()),
    ]
    assert [heard(sample.audio) for sample in data.samples] == [[0.3], [0.3]]
    [fault] = data.faults
    assert "identity" in fault.what and "download" in fault.what
    [sample] = read_data(tmp_path / "talking").samples
    assert sample.answer == "No."
    with pytest.raises(DataError, match="has no dataset walking; it has counting, identity, talking"):
        read_data(tmp_path / "walking")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"audios": []}, r"1 <audio> tag\(s\) and 0 recording"),
        ({"audios": ["1.wav", "2.wav"]}, r"1 <audio> tag\(s\) and 2 recording"),
        ({"images": ["1.jpg"]}, "has images"),
        ({"messages": AUDIO_DEMO["messages"][:1]}, "by turns"),
        ({"messages": [{"role": "user", "content": 5}]}, "content must be a text"),
        ({"messages": ["Hello."]}, "list of objects"),
    ],
)
def test_llama_factory_records_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    data = read_data(write(tmp_path / "d.json", [AUDIO_DEMO, AUDIO_DEMO | change, AUDIO_DEMO]))
    assert len(data.samples) == 2
    [fault] = data.faults
    assert re.search(what, fault.what), fault.what


def test_llama_factory_descriptions_that_cannot_be_used(tmp_path: Path) -> None:
    write(tmp_path / "d.json", [AUDIO_DEMO])
    changes: list[tuple[dict[str, Any], str]] = [
        ({"formatting": "other"}, "formatting is 'other'"),
        ({"ranking": True}, "preferences"),
        ({"columns": {"kto_tag": "good"}}, "preferences"),
        ({"tags": "user"}, "tags must be an object"),
        ({"file_name": "gone.json"}, "there is no such file"),
    ]
    for change, what in changes:
        write(tmp_path / "dataset_info.json", {"d": {"file_name": "d.json", **change}})
        with pytest.raises(DataError, match=f"dataset_info.json: d: .*{what}"):
            read_data(tmp_path / "d", max_bad=0)
