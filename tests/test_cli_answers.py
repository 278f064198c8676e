"""`edgeomni run`: stdin, limits, what is said about the answer and where it goes. The engine behind it is scripted."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from fakes import script, small_spec

from edgeomni import Session, TurnEnd
from edgeomni.cli import main
from edgeomni.cli.answer import Limits, reason
from edgeomni.errors import BundleError
from edgeomni.runtimes import fake
from edgeomni.spans import Spans

TONE = (np.sin(np.arange(8000) / 5) * 0.3).astype(np.float32)
SPEC = small_spec(context=20000)
Asked = list[dict[str, Any]]


def edgeomni(*args: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(args), input=stdin)


def scripted(monkeypatch: pytest.MonkeyPatch, frames: int, **how: Any) -> Asked:
    """Session.open gives a session that answers `frames` LLM frames; returns what respond was asked."""
    asked: Asked = []

    def open_(*args: Any, **ignored: Any) -> Session:
        session = Session(fake.components(SPEC, script(SPEC, frames, **how)), SPEC, None)
        respond = session.respond

        def record(task: Any, **arguments: Any) -> Any:
            asked.append({"task": task, **arguments})
            return respond(task, **arguments)

        monkeypatch.setattr(session, "respond", record)
        return session

    monkeypatch.setattr(Session, "open", open_)
    return asked


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return scripted(monkeypatch, 20)


@pytest.fixture
def question(tmp_path: Path) -> str:
    path = tmp_path / "question.wav"
    soundfile.write(path, TONE, 16000)
    return str(path)


def sound_file(samples: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind)
    return out.getvalue()


# --- stdin


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_sound_file_comes_through_a_pipe(kind: str, asked: Asked) -> None:
    result = edgeomni("run", "b", "-", stdin=sound_file(TONE, 8000, kind))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "<1><2><3>\n" and asked[0]["sample_rate"] == 8000
    np.testing.assert_allclose(asked[0]["audio"], TONE, atol=1e-4)


def test_a_header_that_does_not_know_the_length_is_fine(asked: Asked) -> None:
    """What ffmpeg and sox write into a pipe."""
    whole = sound_file(TONE, 16000)
    at = whole.index(b"data") + 4
    for unknown in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        result = edgeomni("run", "b", "-", stdin=whole[:at] + unknown + whole[at + 4 :])
        assert result.exit_code == 0, result.stderr
        np.testing.assert_allclose(asked[-1]["audio"], TONE, atol=1e-4)


def test_one_channel_of_a_piped_file_can_be_heard(asked: Asked) -> None:
    both = sound_file(np.stack([TONE, np.zeros_like(TONE)], 1), 16000)
    assert edgeomni("run", "b", "-", "--channel", "0", stdin=both).exit_code == 0
    np.testing.assert_allclose(asked[0]["audio"], TONE, atol=1e-4)
    assert edgeomni("run", "b", "-", stdin=both).exit_code == 0
    np.testing.assert_allclose(asked[1]["audio"], TONE / 2, atol=1e-4)
    result = edgeomni("run", "b", "-", "--channel", "1", stdin=both)
    assert result.exit_code == 1 and "silent" in result.stderr


def test_raw_pcm_comes_through_a_pipe(asked: Asked) -> None:
    pcm = np.array([-32768, -1, 0, 1, 16384, 32767] * 200, "<i2")
    result = edgeomni("run", "b", "-", "--stdin-format", "s16le", "--stdin-rate", "8000", stdin=pcm.tobytes())
    assert result.exit_code == 0, result.stderr
    assert asked[0]["sample_rate"] == 8000 and asked[0]["audio"].dtype == np.float32
    np.testing.assert_array_equal(asked[0]["audio"][:6] * 32768, [-32768, -1, 0, 1, 16384, 32767])


@pytest.mark.parametrize(
    ("args", "stdin", "code", "said"),
    [
        (["-"], b"", 1, "stdin: nothing came through the pipe"),
        (["-"], b"no sound" * 50, 1, "--stdin-format s16le"),
        (["-", "--stdin-format", "s16le"], b"", 2, "--stdin-rate HZ"),
        (["-", "--stdin-rate", "8000"], b"", 2, "states its own sample rate"),
        (["-", "--stdin-format", "s16le", "--stdin-rate", "8000", "--channel", "0"], b"", 2, "s16le is mono"),
        (["-", "--stdin-format", "s16le", "--stdin-rate", "8000"], b"abc", 1, "3 bytes end within a 16-bit sample"),
        (["-", "--stdin-format", "s16le", "--stdin-rate", "80"], TONE.tobytes(), 1, "80 Hz"),
        (["q.wav", "--stdin-format", "s16le", "--stdin-rate", "8000"], b"", 2, "give - as QUESTION"),
        (["q.wav", "--stdin-rate", "8000"], b"", 2, "give - as QUESTION"),
        (["-", "--text", "hello"], b"", 2, "takes a sound file, not --text"),
    ],
)
def test_what_cannot_be_a_question_from_stdin(
    args: list[str], stdin: bytes, code: int, said: str, asked: Asked
) -> None:
    result = edgeomni("run", "b", *args, stdin=stdin)
    assert result.exit_code == code and said in result.stderr, result.stderr


# --- limits and sentences


def sounding(out: Path) -> float:
    return float(soundfile.info(out).frames / 24000)


def test_an_answer_that_does_not_end_is_cut_at_30_s(
    tmp_path: Path, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, 12000, eoa=False)
    monkeypatch.setattr("edgeomni.cli.turn.MAX_SECONDS", 3.0)  # as the default does it, in less time
    out = tmp_path / "a.wav"
    result = edgeomni("run", "b", question, "-o", str(out))
    assert result.exit_code == 0 and asked[0]["max_seconds"] == 3.0
    frames = int(3.0 * 24000 / 64)
    assert sounding(out) == frames * 64 / 24000
    limit = f"the answer stopped at the length limit of {frames + 7} frames (3 s of sound; --max-seconds allows more)"
    assert limit in result.stderr


def test_the_default_limit_is_30_s_and_only_for_sound(question: str, asked: Asked) -> None:
    assert edgeomni("run", "b", question).exit_code == 0
    assert edgeomni("run", "b", question, "--max-seconds", "60").exit_code == 0
    assert edgeomni("run", "b", question, "--task", "asr").exit_code == 0
    assert [a["max_seconds"] for a in asked] == [30.0, 60.0, None]
    result = edgeomni("run", "b", question, "--task", "asr", "--max-seconds", "5")
    assert result.exit_code == 2 and "answers in text" in result.stderr
    for wrong in ("0", "-1", "nan", "inf"):
        result = edgeomni("run", "b", question, "--max-seconds", wrong)
        assert result.exit_code == 2 and "max_seconds must be a number" in result.stderr


def test_the_reason_is_a_sentence() -> None:
    def why(code: Any, frames: int = 20, length: int | None = None, seconds: float | None = None) -> str:
        end = TurnEnd(code, "", np.zeros((8, frames), np.int32), 0, {}, Spans())
        return reason(end, "aa", SPEC, Limits(length, seconds))

    assert why("eoa") == why("eot") == "the model ended its answer"
    assert why("cancelled") == "cancelled"
    stopped = "the answer stopped at the length limit of 20 frames"
    thirteen = 13 * 64 / 24000 + 1e-9
    assert why("length", 20, None, thirteen) == f"{stopped} ({thirteen:g} s of sound; --max-seconds allows more)"
    assert why("length", 20, 40, 30.0) == f"{stopped} (--max-length 40 counts the prompt in)"
    assert why("length", 20, None, 30.0) == f"{stopped} (with the prompt they fill the checkpoint's context of 20000)"
    assert "context" in why("length", 20, 20000, 30.0)


# --- what is said, and where


def test_it_says_that_the_sound_is_not_kept(tmp_path: Path, question: str, asked: Asked) -> None:
    note = "the answer's sound is not kept; add -o answer.wav"
    assert note in edgeomni("run", "b", question).stderr
    assert note not in edgeomni("run", "b", question, "-o", str(tmp_path / "a.wav")).stderr
    assert note not in edgeomni("run", "b", question, "-o", "-").stderr
    assert note not in edgeomni("run", "b", question, "--task", "asr").stderr
    assert note not in edgeomni("run", "b", question, "-q").stderr


def test_quiet_leaves_the_answer_and_errors(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = script(SPEC, 20)
    frames[12][2] = SPEC.layout.answer_a  # a codec frame that becomes silence, which is warned of
    session = Session(fake.components(SPEC, frames), SPEC, None)
    monkeypatch.setattr(Session, "open", lambda *args, **how: session)
    loud, quiet = edgeomni("run", "b", question), edgeomni("run", "b", question, "-q")
    assert "became silence" in loud.stderr and "1 silent frames" in loud.stderr
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "<1><2><3>\n", "")

    def broken(*args: Any, **how: Any) -> None:
        raise BundleError("no bundle here")

    monkeypatch.setattr(Session, "open", broken)
    assert "no bundle here" in edgeomni("run", "b", question, "--quiet").stderr


def test_verbose_tells_information_and_stages(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(*args: Any, **how: Any) -> Session:
        logging.getLogger("edgeomni").info("device %s, threads: %s", how["device"], how["threads"])
        return Session(fake.components(SPEC, script(SPEC, 20)), SPEC, None)

    monkeypatch.setattr(Session, "open", open_)
    result = edgeomni("run", "b", question, "-v", "--threads", "3", "--device", "cpu")
    assert "device cpu, threads: 3" in result.stderr
    assert "stage encoder: 0." in result.stderr and "stage frame: 21 times, 0." in result.stderr
    assert "threads: 3" not in edgeomni("run", "b", question, "--threads", "3").stderr, "the level was put back"
    both = edgeomni("run", "b", question, "-q", "-v")
    assert both.exit_code == 2 and "contradict" in both.stderr


def test_json_is_one_object_on_stdout(tmp_path: Path, question: str, asked: Asked) -> None:
    out, tokens = tmp_path / "a.wav", tmp_path / "t.npz"
    result = edgeomni("run", "b", question, "-o", str(out), "--tokens-out", str(tokens), "--json")
    data = json.loads(result.stdout)
    assert result.stderr.startswith("<1><2><3>\n") and "20 frames" in result.stderr
    assert data["text"] == "<1><2><3>" and data["task"] == "aa"
    assert data["reason"] == {"code": "eoa", "sentence": "the model ended its answer"}
    assert (data["frames"], data["silent_frames"]) == (20, 0)
    assert data["timings"]["audio"] == 13 * 64 / 24000 == sounding(out)
    assert data["stages"]["frame"]["count"] == 21 and data["stages"]["encoder"]["seconds"] >= 0
    assert data["files"] == {"audio": str(out), "tokens": str(tokens)}


def test_json_goes_with_quiet_but_not_with_sound_on_stdout(tmp_path: Path, question: str, asked: Asked) -> None:
    result = edgeomni("run", "b", question, "--task", "asr", "-o", str(tmp_path / "a.wav"), "--json", "-q")
    assert result.stderr == "" and json.loads(result.stdout)["files"] == {}, "asr writes no sound"
    result = edgeomni("run", "b", question, "-o", "-", "--json")
    assert result.exit_code == 2 and "both want stdout" in result.stderr
