"""SLAM-Omni's JSON Lines, laid out by hand as its README has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_wavs import RATE, tone, wav

from edgeomni.data.readers import read_data
from edgeomni.data.slam_omni import rounds
from edgeomni.errors import DataError


def test_slam_omni_rounds() -> None:
    assert rounds("Hello.") == ((), "Hello.")
    assert rounds("<USER>: Hello.") == ((), "Hello.")
    said = "<USER>: a <ASSISTANT>: b <USER>: c <ASSISTANT>: d <USER>: e"
    assert rounds(said) == ((("a", "b"), ("c", "d")), "e")
    for bad in ("<USER>: a <ASSISTANT>: b", "<USER>: a <USER>: b <USER>: c", "a <USER>: b"):
        with pytest.raises(DataError, match="by turns"):
            rounds(bad)


def test_slam_omni(tmp_path: Path) -> None:
    wav(tmp_path / "1.wav", 0.1), wav(tmp_path / "2.wav", 0.2)
    one = {
        "key": "1",
        "source_wav": str(tmp_path / "1.wav"),
        "source_text": "Can you recommend some food?",
        "target_wav": "2.wav",
        "target_text": "Try dumplings.",
    }
    rounds = "<USER>: Hello. <ASSISTANT>: Good day. <USER>: And more?"
    records = [one, one | {"source_text": "<ASSISTANT>: Hello."}, one | {"source_text": rounds, "target_wav": None}]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = read_data(file)
    assert data.format == "slam-omni"
    first, last = data.samples
    assert set(first.tasks()) == {"asr", "at", "aa", "tt", "ta"}
    assert (first.text, first.answer, first.history) == ("Can you recommend some food?", "Try dumplings.", ())
    np.testing.assert_array_equal(first.audio[0].read(RATE), tone(0.1))
    assert first.answer_audio is not None
    np.testing.assert_array_equal(first.answer_audio.read(RATE), tone(0.2))
    assert (last.text, last.history) == ("And more?", (("Hello.", "Good day."),))
    assert set(last.tasks()) == {"asr", "at", "tt"}
    assert [fault.where for fault in data.faults] == [f"{file}:2"]
