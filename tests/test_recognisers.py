"""Recognisers: pocketsphinx on espeak-ng's speech, and commands of every manner."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from answering import answering

from edgeomni.arrays import F32
from edgeomni.audio import resample
from edgeomni.data import espeak
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import DataError, EngineError, UsageError
from edgeomni.evaluate import evaluate, recognisers
from edgeomni.evaluate.recognisers import Command, Hearings, PocketSphinx, recogniser_of

SENTENCES = ["The answer is twelve.", "the opposite of cold is hot", "I don't know!", "public grammar", "twenty-one"]
TONE = (np.sin(np.arange(16000) / 4) * 0.5).astype(np.float32)


def say(text: str, rate: int = 16000) -> F32:
    return espeak.say(text, "en-us+robosoft", rate_wpm=145, rate=rate)


@pytest.fixture(scope="module")
def sphinx() -> PocketSphinx:
    return PocketSphinx(SENTENCES)


@pytest.mark.parametrize(
    ("sentence", "heard"),
    [
        (SENTENCES[0], "the answer is twelve"),
        (SENTENCES[1], "the opposite of cold is hot"),
        (SENTENCES[2], "i don't know"),
        (SENTENCES[3], "public grammar"),
        (SENTENCES[4], "twenty one"),
    ],
)
def test_pocketsphinx_hears_what_is_said(sphinx: PocketSphinx, sentence: str, heard: str) -> None:
    assert sphinx.hear(say(sentence)) == heard
    assert sphinx.left_out == {}


def test_pocketsphinx_hears_the_same_whatever_came_before(sphinx: PocketSphinx) -> None:
    sound = say(SENTENCES[0])
    first = sphinx.hear(sound)
    for other in (say(SENTENCES[1]) * 0.1, np.zeros(16000, np.float32), TONE):
        sphinx.hear(other)
        assert sphinx.hear(sound) == first == "the answer is twelve"


def test_pocketsphinx_hears_nothing_in_silence(sphinx: PocketSphinx) -> None:
    assert sphinx.hear(np.zeros(16000, np.float32)) == sphinx.hear(np.zeros(1, np.float32)) == ""


def test_sentences_with_unknown_words_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    heard = PocketSphinx(["the cat meows", *SENTENCES, "it is 12", "東京", "meows"])
    assert heard.left_out == {"the cat meows": ["meows"], "it is 12": ["12"], "東京": ["東京"], "meows": ["meows"]}
    assert "4 answer(s) hold words that pocketsphinx's dictionary lacks (12, meows, 東京)" in caplog.text
    assert heard.hear(say(SENTENCES[1])) == "the opposite of cold is hot"


@pytest.mark.parametrize("sentences", [[], ["hello my friend"], ["hello!", "Hello"], ["meows", "neighs", "hello"]])
def test_a_grammar_of_one_sentence_would_hear_it_in_anything(sentences: list[str]) -> None:
    with pytest.raises(DataError, match="dictionary knows [01], where it takes two"):
        PocketSphinx(sentences)


def test_signs_in_an_answer_do_not_reach_the_grammar() -> None:
    hostile = ["hello | <answer> = you", "good bye <s>", "read <sil> \\ $x"]
    heard = PocketSphinx([*hostile, "good bye; public (now)", "read /* this */, {tag} // the book"])
    assert list(heard.left_out) == hostile
    assert heard.hear(say("good bye public now")) == "good bye public now"
    assert heard.hear(say("read this tag the book")) == "read this tag the book"


def test_pocketsphinx_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(EngineError, match=r"pocketsphinx is not installed: pip install .*\[evaluate\]"):
        recogniser_of("pocketsphinx", SENTENCES)


def test_a_model_that_speaks_is_heard_beside_its_ceiling_and_its_floor(tmp_path: Path) -> None:
    """It writes every answer and says three of five: the others are noise and another answer."""
    texts = [
        "the answer is twelve",
        "the opposite of cold is hot",
        "public grammar",
        "good bye my friend",
        "it is monday",
    ]
    speech = [say(text, rate=24000) for text in texts]
    samples = []
    for i, text in enumerate(texts):
        soundfile.write(tmp_path / f"{i}.wav", speech[i], 24000)
        samples.append(Sample(f"t:{i}", "ta", text="which", answer=text, answer_audio=Clip.of(tmp_path / f"{i}.wav")))
    noise = np.random.default_rng(0).standard_normal(24000).astype(np.float32) * 0.1
    session = answering(texts, [*speech[:3], noise, speech[0]], ["which"])
    found = evaluate(session, samples, recogniser="pocketsphinx")
    figures = {name: metric.value for name, metric in found.metrics("ta").items()}
    assert (figures["exact"], figures["heard_exact"], figures["ceiling_exact"]) == (1, 0.6, 1)
    assert figures["floor_exact"] <= 0.2 and figures["heard_wer"] < figures["floor_wer"]


# --- what every recogniser gets


class Noting:
    name = "noting"

    def __init__(self) -> None:
        self.heard: list[F32] = []

    def hear(self, samples: F32) -> str:
        self.heard.append(samples)
        return f"sound {len(self.heard)}"


def test_sound_is_heard_at_16_khz_and_once() -> None:
    noting = Noting()
    hearings = Hearings(noting)
    assert [hearings.hear(TONE, 24000), hearings.hear(TONE * 0.9, 24000), hearings.hear(TONE, 24000)] == [
        "sound 1",
        "sound 2",
        "sound 1",
    ]
    np.testing.assert_array_equal(noting.heard[0], resample(TONE, 24000, 16000))
    assert hearings.hear(TONE, 16000) == "sound 3", "the same samples at another rate are another sound"


def test_no_sound_is_no_speech() -> None:
    noting = Noting()
    hearings = Hearings(noting)
    spoilt = TONE.copy()
    spoilt[7] = np.inf
    assert hearings.hear(TONE[:0], 16000) == hearings.hear(spoilt, 16000) == "" and noting.heard == []


def test_a_name_becomes_a_recogniser_when_it_is_needed() -> None:
    hearings = Hearings("pocketsphinx", ["hello"])
    with pytest.raises(DataError):
        hearings.check()
    assert Hearings("pocketsphinx", SENTENCES).recogniser.name == "pocketsphinx"


# --- commands


def program(folder: Path, code: str, name: str = "hear it.py") -> str:
    """A command line that runs `code` with Python."""
    (folder / name).write_text(code, encoding="utf-8")
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(folder / name))}"


DESCRIBE = """
import sys, wave
with wave.open(sys.argv[-1]) as f:
    print(f.getframerate(), f.getnchannels(), f.getsampwidth(), f.getnframes(), *sys.argv[1:-1])
"""


def test_a_command_gets_a_wav_and_its_output_is_the_transcript(tmp_path: Path) -> None:
    line = program(tmp_path, DESCRIBE)
    assert recogniser_of(line, []).hear(TONE) == "16000 1 2 16000"
    assert Command(f"{line} 'two words' {{wav}}").hear(TONE) == "16000 1 2 16000 two words"


def test_the_path_may_stand_anywhere_and_the_file_goes_away(tmp_path: Path) -> None:
    line = program(tmp_path, "import sys; print(sys.argv[1:])")
    said = Command(f"{line} --file={{wav}} --quiet").hear(TONE)
    option, quiet = said.strip("[]").replace("'", "").split(", ")
    assert option.startswith("--file=/") and option.endswith(".wav") and quiet == "--quiet"
    assert not Path(option.removeprefix("--file=")).exists()


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    line = program(tmp_path, "import sys; print(*sys.argv[1:-1])")
    assert Command(f"{line} '$HOME;' `id` '>' out").hear(TONE) == "$HOME; `id` > out"


@pytest.mark.parametrize(
    ("code", "heard"),
    [
        ("print('  The answer\\n\\n is\\ttwelve ')", "The answer is twelve"),
        ("pass", ""),
        ("import sys; sys.stdout.buffer.write(b'caf\\xe9 \\xc3\\xa9\\0')", "caf\ufffd é\0"),
        ("import sys; print('loading', file=sys.stderr); print('hi')", "hi"),
        ("print('x' * 300_000)", "x" * 300_000),
        ("import sys; print(repr(sys.stdin.read()))", "''"),
    ],
)
def test_odd_output(tmp_path: Path, code: str, heard: str) -> None:
    assert Command(program(tmp_path, code)).hear(TONE) == heard


def test_a_command_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    failing = program(tmp_path, "import sys; print('never'); sys.exit('no model in /models')")
    with pytest.raises(EngineError, match=r"failed with exit code 1: no model in /models"):
        Command(failing).hear(TONE)
    with pytest.raises(EngineError, match="exit code 3: nothing on stderr"):
        Command(program(tmp_path, "raise SystemExit(3)")).hear(TONE)


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    """The child of the command keeps the pipe open, and would keep the evaluation waiting for a minute."""
    child = "import os, time; open(os.environ['PIDS'], 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pids = tmp_path / "pid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIDS", str(pids))
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"did not answer within 2 s; allow it more with --recogniser-timeout"):
            Command(program(tmp_path, code), timeout_s=2).hear(TONE)
    assert time.monotonic() - began < 50, "it did not wait for the child"
    assert not _runs(int(pids.read_text()))


def _runs(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("line", ["", "  ", "no-such-program-here {wav}", "pocket-sphinx"])
def test_what_is_no_command_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="no such program; give pocketsphinx, or a command"):
        recogniser_of(line, SENTENCES)


def test_quotes_that_do_not_close_are_refused() -> None:
    with pytest.raises(UsageError, match="check its quotes"):
        recogniser_of("hear 'it", SENTENCES)


def test_a_file_that_is_no_program_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hear"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    with pytest.raises(EngineError, match="cannot be started"):
        Command(str(path)).hear(TONE)


def test_words_are_spelled_as_the_dictionary_spells_them() -> None:
    known = {"don't", "dont", "oclock", "it", "is", "twenty", "one"}.__contains__
    assert recognisers.grammar_words("“Don’t” it is o'clock, twenty-one.", known) == (
        ["don't", "it", "is", "oclock", "twenty", "one"],
        [],
    )
    assert recognisers.grammar_words("it's 12", known) == (["its", "12"], ["its", "12"])
