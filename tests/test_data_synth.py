"""`edgeomni data synth`: whole folders, looked at with soundfile, json and a second count of what is held out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from test_data_synth_recipes import GOOD

from edgeomni.cli import main
from edgeomni.data.readers import read_data
from edgeomni.data.synth import synthesize
from edgeomni.data.synth_speech import Speech, pink_noise, recording
from edgeomni.errors import AudioError, DataError, UsageError

NUMBERS = ["zero", "one", "two", "three"]


def made(tmp_path: Path, text: str = GOOD, out: str = "out", **how: Any) -> Path:
    (tmp_path / "mine.toml").write_text(text)
    return synthesize(tmp_path / "mine.toml", tmp_path / out, **{"language": "en-us", **how})


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_folder_holds_recordings_and_lines_that_fit(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert sorted(os.listdir(folder)) == ["answers", "audio", "recipe.toml", "synth.json", "test.jsonl", "train.jsonl"]
    train, test = lines(folder, "train"), lines(folder, "test")
    assert (len(train), len(test)) == (20, 5)
    assert set(train[0]) == {"audio", "text", "answer", "answer_audio", "language", "speaker"}
    for line in [*train, *test]:
        question, answer = (soundfile.info(str(folder / line[key])) for key in ("audio", "answer_audio"))
        assert question.samplerate == answer.samplerate == 16_000 and question.channels == 1
        assert 0.4 < answer.duration < 3 and 0.6 < question.duration < 4
        assert line["language"] == "en-us"
    assert len(list((folder / "answers").iterdir())) == len({line["answer"] for line in [*train, *test]})
    assert len({(line["answer"], line["answer_audio"]) for line in train}) == len({line["answer"] for line in train})
    data = read_data(str(folder / "train.jsonl"))
    assert [sample.tasks() for sample in data.samples] == [("asr", "at", "aa", "tt", "ta")] * 20
    assert (folder / "recipe.toml").read_text() == GOOD


def test_splits_share_nothing_that_is_new_by_a_second_count(tmp_path: Path) -> None:
    text = GOOD.replace("a + b <= 2 and a > 0", "a + b <= 3") + '[splits.sums]\nsamples = 12\nnew = ["arguments"]\n'
    folder = made(tmp_path, text, samples=40)

    def pair(line: dict[str, Any]) -> tuple[str, ...]:
        return tuple(word for word in line["text"].split() if word in NUMBERS)

    def speakers(split: str) -> set[str]:
        return {line["speaker"] for line in lines(folder, split)}

    assert speakers("train") == speakers("sums") == {"en-us"} and speakers("test") == {"en-us+f2"}
    assert not any(line["text"].removeprefix("please ").startswith("add") for line in lines(folder, "train"))
    assert all(line["text"].removeprefix("please ").startswith("add") for line in lines(folder, "test"))
    held, seen = ({pair(line) for line in lines(folder, split)} - {()} for split in ("sums", "train"))
    assert held and seen and not held & seen
    assert {pair(line) for line in lines(folder, "test")} <= seen
    assert len(held | seen) == 10  # all of a + b <= 3: every question is asked before one is asked again
    for line in lines(folder, "sums"):
        a, b = pair(line)
        assert line["answer"] == f"it is {NUMBERS[NUMBERS.index(a) + NUMBERS.index(b)]}"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    noisy = GOOD.replace("[lists]", "[recording]\nnoise_share = 0.5\n[lists]")
    told: list[tuple[int, int]] = []
    one = digests(made(tmp_path, noisy, "one", seed=3))
    two = digests(made(tmp_path, noisy, "two", seed=3, workers=2, progress=lambda *done: told.append(done)))
    recordings = sum(name.endswith(".wav") for name in two)
    assert told == [(done, recordings) for done in range(1, recordings + 1)]
    other = digests(made(tmp_path, noisy, "other", seed=4))
    assert one == two
    assert one["train.jsonl"] != other["train.jsonl"] and one["audio/train/0000.wav"] != other["audio/train/0000.wav"]


def test_tasks_decide_what_is_recorded_and_written(tmp_path: Path) -> None:
    folder = made(tmp_path, GOOD.replace("[lists]", "[lists]\n", 1).replace("title", 'tasks = ["tt"]\ntitle', 1), "tt")
    assert not (folder / "audio").exists() and not (folder / "answers").exists()
    assert set(lines(folder, "train")[0]) == {"text", "answer", "language"}
    folder = made(tmp_path, GOOD.replace("title", 'system = "Be short."\ntasks = ["asr", "at"]\ntitle', 1), "asr_at")
    first, second = lines(folder, "train")[:2]
    assert (first["task"], second["task"]) == ("asr", "at") and first["audio"] == second["audio"]
    assert len(lines(folder, "train")) == 40 and not (folder / "answers").exists()
    assert first["system"] == "Be short."


def test_samples_bound_every_split(tmp_path: Path) -> None:
    folder = made(tmp_path, samples=3)
    assert (len(lines(folder, "train")), len(lines(folder, "test"))) == (3, 3)
    assert len(lines(made(tmp_path, out="more", samples=30), "test")) == 5


def test_a_text_file_in_another_language_is_spoken(tmp_path: Path) -> None:
    (tmp_path / "es.txt").write_text("hola amigo\nbuenos días\n¿qué tal?\tmuy bien\n", encoding="utf-8")
    folder = synthesize("repeat", tmp_path / "es", language="es", text=tmp_path / "es.txt", samples=6, format="flac")
    train, test = lines(folder, "train"), lines(folder, "test")
    pairs = {(line["text"], line["answer"]) for line in [*train, *test]}
    assert pairs == {("hola amigo", "hola amigo"), ("buenos días", "buenos días"), ("¿qué tal?", "muy bien")}
    assert not {line["text"] for line in train} & {line["text"] for line in test}
    assert not {line["speaker"] for line in train} & {line["speaker"] for line in test}
    assert soundfile.info(str(folder / train[0]["audio"])).format == "FLAC"


def test_another_rate(tmp_path: Path) -> None:
    folder = made(tmp_path, samples=2, rate=24_000)
    assert soundfile.info(str(folder / lines(folder, "train")[0]["audio"])).samplerate == 24_000


SPEECH = Speech("the answer is twelve", "en-us+f2", 160, 50, 50, before_s=0.0, after_s=0.0)


def test_silence_gain_and_noise_are_as_asked() -> None:
    from dataclasses import replace

    plain = recording(SPEECH, 16_000)
    padded = recording(replace(SPEECH, before_s=0.25, after_s=0.5), 16_000)
    assert len(padded) == len(plain) + 12_000 and not padded[:4_000].any() and not padded[-8_000:].any()
    np.testing.assert_allclose(padded[4_000:-8_000], plain, atol=1e-6)
    quiet = recording(replace(SPEECH, gain_db=-20.0), 16_000)
    assert np.abs(quiet).max() == pytest.approx(0.1 * min(1.0, np.abs(plain).max() / 0.99), rel=0.15)
    assert np.abs(recording(replace(SPEECH, gain_db=20.0), 16_000)).max() == pytest.approx(0.99, abs=1e-3)
    noisy = recording(replace(SPEECH, gain_db=-20.0, snr_db=10.0, seed=5), 16_000)
    ratio = 10 * np.log10(np.mean(quiet.astype(float) ** 2) / np.mean((noisy - quiet).astype(float) ** 2))
    assert ratio == pytest.approx(10, abs=1)
    assert (recording(replace(SPEECH, gain_db=-20.0, snr_db=10.0, seed=6), 16_000) != noisy).any()


def test_noise_is_pink() -> None:
    noise = pink_noise(1 << 16, 0)
    assert len(pink_noise(12_345, 1)) == 12_345
    assert np.sqrt(np.mean(noise.astype(float) ** 2)) == pytest.approx(1, abs=1e-3)
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [10 * np.log10(power[1 << k : 2 << k].mean()) for k in range(8, 15)]
    np.testing.assert_allclose(np.diff(octaves), -3, atol=0.8)


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        ({"language": "xx"}, UsageError, "no language 'xx'"),
        ({"language": None}, UsageError, "choose one: --language"),
        ({"rate": 10}, AudioError, "sample rate 10 Hz"),
        ({"workers": 0}, UsageError, "whole number from 1"),
        ({"samples": 0}, UsageError, "samples must be 1 or more"),
        ({"format": "mp3"}, UsageError, "known are wav, flac"),
        ({"text": GOOD.replace("[lists]", '[answer_voice]\nvoice = "en-us+nosuch"\n[lists]')}, UsageError, "'nosuch'"),
        ({"text": "lines.txt"}, UsageError, "has its own sentences"),
        ({"text": GOOD.replace('answer = "{city}"', 'answer = "{"')}, DataError, "brace"),
        ({"text": GOOD.replace('"paris"', '"..."')}, DataError, "gives no sound for the text '...'"),
        ({"text": GOOD.replace('"paris"', '"..."'), "workers": 2}, DataError, "gives no sound for the text '...'"),
    ],
)
def test_errors_leave_nothing_behind(wrong: dict[str, Any], error: type[Exception], named: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=re.escape(named)):
        if wrong.get("text") == "lines.txt":
            (tmp_path / "mine.toml").write_text(GOOD)
            synthesize(tmp_path / "mine.toml", tmp_path / "out", language="en-us", text="lines.txt")
        else:
            made(tmp_path, **wrong)
    assert os.listdir(tmp_path) == ["mine.toml"]


def test_a_recipe_for_a_text_file_needs_one_and_a_language_that_fits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one: --text FILE"):
        synthesize("repeat", tmp_path / "out", language="es")
    with pytest.raises(UsageError, match="written for en-us, en, not for 'es'"):
        synthesize("en-small", tmp_path / "out", language="es")


def test_what_exists_is_replaced_with_force_and_only_if_it_was_synthesized(tmp_path: Path) -> None:
    folder = made(tmp_path, samples=2)
    with pytest.raises(UsageError, match="exists; choose another path"):
        made(tmp_path, samples=3)
    assert len(lines(folder, "train")) == 2
    assert len(lines(made(tmp_path, samples=3, force=True), "train")) == 3
    (folder / "synth.json").unlink()
    with pytest.raises(UsageError, match="holds no synth.json"):
        made(tmp_path, samples=4, force=True)
    assert len(lines(folder, "train")) == 3


def test_the_command_makes_the_folder_and_tells_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    arguments = ["data", "synth", "--recipe", "mine.toml", "--language", "en-gb", "-o", "out", "--samples", "4"]
    command = [sys.executable, "-m", "edgeomni", *arguments, "--seed", "7", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "train.jsonl" in done.stdout and "mine, en-gb, seed 7" in done.stdout
    assert re.search(r"synth: (\d+) of \1 recordings", done.stderr)
    train = lines(tmp_path / "out", "train")
    assert len(train) == 4 and {line["speaker"] for line in train} == {"en-gb"}


def test_the_command_lists_voices_and_recipes() -> None:
    listed = CliRunner().invoke(main, ["data", "synth", "--list-voices"])
    assert listed.exit_code == 0 and "en-us" in listed.stdout and "robosoft" in listed.stdout
    of_one = CliRunner().invoke(main, ["data", "synth", "--list-voices", "--language", "cmn"]).stdout.splitlines()
    assert of_one[0] == "cmn" and "cmn+f2" in of_one
    assert CliRunner().invoke(main, ["data", "synth", "--list-voices", "--language", "xx"]).exit_code == 2
    recipes = CliRunner().invoke(main, ["data", "synth", "--list-recipes"]).stdout
    assert "en-small" in recipes and "repeat" in recipes
    nothing = CliRunner().invoke(main, ["data", "synth"])
    assert nothing.exit_code == 2 and "--recipe and -o DIR" in nothing.output
