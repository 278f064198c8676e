"""`edgeomni demo` on the shipped model: one whole run, runs of installs that lack something, and its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

import edgeomni as package
from edgeomni.bundle import Bundle
from edgeomni.cli import main
from edgeomni.data import espeak
from edgeomni.data.readers import read_data
from edgeomni.demo import precisions
from edgeomni.demo.answer import longest
from edgeomni.demo.question import possible_answers
from edgeomni.evaluate import Evaluation, evaluate
from edgeomni.evaluate.recognisers import Hearings
from edgeomni.evaluate.run import Asking

SHIPPED = Path(package.__file__).parent / "nano"
QUESTIONS = 2
RUN_WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); "
    "from edgeomni.cli import main; main(sys.argv[2:])"
)


def edgeomni(*args: object) -> Result:
    """With room for the table: pytest-xdist sets the width to 80, where its rows become lines."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(main, [str(a) for a in args])


def without(modules: str, *args: object) -> str:
    """What the demo prints in a process that cannot import `modules`."""
    command = [sys.executable, "-c", RUN_WITHOUT, modules, "demo", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    return found


@pytest.fixture(scope="module")
def said_and_made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("demo") / "made"
    result = edgeomni("demo", "-o", folder, "--questions", QUESTIONS, "--threads", 1)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout, folder


@pytest.fixture(scope="module")
def made(said_and_made: tuple[str, Path]) -> Path:
    return said_and_made[1]


def test_it_tells_the_question_both_answers_the_table_and_the_folder(said_and_made: tuple[str, Path]) -> None:
    said, folder = said_and_made
    found = facts(folder)
    lines = said.splitlines()
    assert lines[0].startswith(f'question:   "{found["question"]["text"]}"')
    assert f"it hears:   {found['heard']}\nit answers: {found['answer']['text']}\n" in said
    assert [name for name in ("fp32", "INT8", "INT4") if f"│ {name}" in said] == ["fp32", "INT8", "INT4"]
    assert lines[-1].startswith(str(folder)) and "answer.wav" in lines[-1] and "left out" not in said


def test_the_folder_holds_all_of_it(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {
        *("question.wav", "answer.wav", "picture.png", "demo.json", "data"),
        *("bundle-fp32", "bundle-int8"),
    }
    found, answer = facts(made), soundfile.info(str(made / "answer.wav"))
    assert answer.samplerate == Bundle.open(SHIPPED / "bundle").spec.codec.sample_rate
    assert answer.duration == pytest.approx(found["answer"]["timings"].get("audio", 0)) and answer.duration <= 4.2
    first = json.loads((made / "data" / "test.jsonl").read_text().splitlines()[0])
    assert found["question"]["text"] == first["text"] and first["speaker"] in found["question"]["origin"]
    asked, _ = soundfile.read(made / "question.wav", dtype="int16")
    spoken, _ = soundfile.read(made / "data" / first["audio"], dtype="int16")
    np.testing.assert_array_equal(asked, spoken)
    assert (
        found["threads"] == 1
        and found["left_out"] == []
        and list(found["precisions"]) == sorted(["fp32", "int4", "int8"])
    )


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_table_is_what_an_evaluation_of_its_own_finds(made: Path, precision: str) -> None:
    path = SHIPPED / "bundle" if precision == "int4" else made / f"bundle-{precision}"
    bundle, samples = Bundle.open(path), read_data(str(made / "data" / "test.jsonl")).samples
    rows = asked_again(bundle, samples).rows
    asr = [row for row in rows if row.task == "asr"]
    aa = [row for row in rows if row.task == "aa"]
    assert len(asr) == len(aa) == QUESTIONS
    figures = facts(made)["precisions"][precision]["figures"]
    assert figures["wer"] == pytest.approx(100 * jiwer.wer([r.reference for r in asr], [r.text for r in asr]))
    assert figures["exact"] == 100 * sum(row.text.strip() == row.reference for row in aa) / QUESTIONS
    assert figures["heard"] == 100 * sum(row.heard == row.reference for row in aa) / QUESTIONS
    assert figures["ceiling"] == 100 * sum(row.heard_reference == row.reference for row in aa) / QUESTIONS
    assert figures["floor"] == 100 * sum(row.heard == row.shuffled for row in aa) / QUESTIONS
    assert figures["mb"] == bundle.size / 1e6 and figures["rtf"] > 0 and figures["first_audio_ms"] > 0
    assert figures["peak_rss_mb"] > bundle.size / 1e6


def asked_again(bundle: Bundle, samples: Any) -> Evaluation:
    how = Asking(max_seconds=4.0, max_length=longest(bundle.spec))
    hearings = Hearings("pocketsphinx", possible_answers())
    return evaluate(bundle, samples, tasks=("asr", "aa"), recogniser=hearings, asking=how, threads=1)


def test_a_recogniser_has_every_answer_to_choose_from() -> None:
    answers = possible_answers()
    assert {"the answer is twelve", "bees make honey", "the opposite of hot is cold"} <= set(answers)
    assert len(answers) == len(set(answers)) > 200


def test_without_torch_the_users_question_is_asked_of_int4(tmp_path: Path) -> None:
    wav, folder = tmp_path / "mine.wav", tmp_path / "demo"
    soundfile.write(wav, espeak.say("what is two plus three", "en-us+f2", rate=22050), 22050)
    folder.mkdir()
    (folder / "demo.json").write_text("{}")
    (folder / "old.txt").write_text("of an earlier run")
    said = without("torch", wav, "-o", folder, "--questions", 1, "--threads", 1, "--force")
    found = facts(folder)
    assert not (folder / "old.txt").exists() and (folder / "picture.png").is_file()
    assert found["question"]["origin"] == "yours" and found["question"]["text"] == ""
    asked = soundfile.info(str(folder / "question.wav"))
    assert asked.samplerate == 16000 and asked.duration == pytest.approx(soundfile.info(str(wav)).duration, abs=0.001)
    assert list(found["precisions"]) == ["int4"] and "wer" in found["precisions"]["int4"]["figures"]
    (why,) = found["left_out"]
    assert "INT4 alone" in why and "torch" in why and "[export]" in why
    assert f"left out: {why}" in said


def test_with_nothing_installed_but_the_runtime_it_answers_the_shipped_question(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    without("torch,espeakng_loader,pocketsphinx,jiwer,matplotlib", "-o", folder, "--threads", 1)
    found = facts(folder)
    assert found["question"]["text"] == (SHIPPED / "question.txt").read_text().strip()
    assert set(found["precisions"]["int4"]["figures"]) == {"mb", "first_audio_ms", "rtf", "peak_rss_mb"}
    assert sorted(path.name for path in folder.iterdir()) == ["answer.wav", "demo.json", "question.wav"]
    speech, picture, export = sorted(found["left_out"], key=lambda why: ("torch" in why, "matplotlib" in why))
    assert "espeak-ng" in speech and "[synth]" in speech
    assert "[train]" in picture and "[export]" in export


def test_words_that_cannot_be_measured_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    words, (why,) = precisions.words_of([], ["one two", "three four"])
    assert words.tasks == ["asr", "aa"] and words.hearings is None
    assert "pocketsphinx" in why and "[evaluate]" in why
    monkeypatch.setitem(sys.modules, "jiwer", None)
    words, (why,) = precisions.words_of([], ["one two", "three four"])
    assert words.tasks == ["aa"] and words.hearings is None and "jiwer" in why and "[evaluate]" in why


@pytest.mark.parametrize("link", [False, True])
def test_an_existing_folder_is_left_alone(tmp_path: Path, link: bool) -> None:
    target = tmp_path / "mine"
    if link:
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    refused = edgeomni("demo", "-o", target)
    assert refused.exit_code == 2 and "exists" in refused.stderr
    if not link:
        forced = edgeomni("demo", "-o", target, "--force")
        assert forced.exit_code == 2 and "holds no demo.json" in forced.stderr
        assert [path.name for path in target.iterdir()] == ["thesis.txt"]


def test_a_question_that_is_no_sound_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "q.wav").write_bytes(b"no sound")
    result = edgeomni("demo", tmp_path / "q.wav", "-o", tmp_path / "demo")
    assert result.exit_code == 1 and "q.wav" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["q.wav"]
