"""The commands on a real, tiny model: checkpoint, bundle, answer, profile, as a user spells them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from edgeomni.cli import main
from edgeomni.profiling.question import spoken_question

EXPORT = ["export", "--preset", "tiny", "--random", "--seed", "0"]


def edgeomni(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    soundfile.write(root / "question.wav", spoken_question(1.0), 16000)
    return root


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    result = edgeomni(*EXPORT, "-o", folder / "bundle", "--profile", "x86-avx512")
    assert result.exit_code == 0, result.output
    assert "llm.top1" in result.stdout and "digest" in result.stdout
    return folder / "bundle"


@pytest.mark.parametrize(("task", "name"), [("aa", "BATCH"), ("at", "AT"), ("asr", "ASR")])
def test_the_published_layout_runs_to_the_last_token(task: str, name: str, tmp_path: Path, golden: Any) -> None:
    out = tmp_path / "tokens.npz"
    result = edgeomni(
        "run",
        golden.path,
        golden.path / "question.wav",
        "--task",
        task,
        "--greedy",
        "--max-length",
        golden.meta["max_returned_tokens"],
        "--tokens-out",
        out,
    )
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(out)["tokens"], golden[f"{name}_tokens"])


def test_a_profile_chooses_the_precisions(bundle: Path) -> None:
    data = json.loads(edgeomni("inspect", bundle, "--json").stdout)
    assert {k: c["precision"] for k, c in data["components"].items()} == {
        "encoder": "int8",
        "llm": "int4",
        "codec": "fp32",
    }
    assert data["gate"]["passed"] and data["provenance"]["weights"] == "random"
    shown = edgeomni("inspect", bundle).stdout
    assert "not judged: random weights" in shown


def test_a_bundle_answers_without_torch(bundle: Path, folder: Path) -> None:
    args = ["run", str(bundle), "--task", "aa", str(folder / "question.wav"), "-o", str(folder / "answer.wav")]
    args += ["--max-length", "100", "--tokens-out", str(folder / "answer.npz")]
    code = (
        f"import sys; from edgeomni.cli import main; main({args!r}, standalone_mode=False); "
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'a device needs none of these'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the text goes to stdout"
    tokens = np.load(folder / "answer.npz")["tokens"]
    data = json.loads(edgeomni("inspect", bundle, "--json").stdout)
    streams = data["spec"]["layout"]["streams"]
    codec = data["spec"]["codec"]
    frame_samples = codec["hop"] * codec["vq_strides"][0]
    assert soundfile.info(folder / "answer.wav").frames == max(0, tokens.shape[1] - streams) * frame_samples


def test_raw_pcm_goes_to_stdout_and_text_to_stderr(bundle: Path, folder: Path) -> None:
    result = edgeomni("run", bundle, folder / "question.wav", "-o", "-", "--max-length", "80", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout_bytes) % 2 == 0 and len(result.stdout_bytes) > 0
    assert "frames in" in result.stderr


def test_a_flipped_byte_is_named(bundle: Path, tmp_path: Path) -> None:
    assert edgeomni("verify", bundle).exit_code == 0
    path = next(bundle.glob("llm/*.onnx"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        for command in (["verify", bundle], ["run", bundle, "--text", "x"]):
            result = edgeomni(*command)
            assert result.exit_code == 1 and path.name in result.stderr
    finally:
        path.write_bytes(whole)


def test_a_missed_gate_leaves_nothing_and_exits_3(tmp_path: Path) -> None:
    result = edgeomni(*EXPORT, "-o", tmp_path / "b", "--gate", "llm.top1=1.1")
    assert result.exit_code == 3 and "llm.top1" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_to_overwrite(bundle: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in bundle.rglob("*"))
    result = edgeomni(*EXPORT, "-o", bundle)
    assert result.exit_code == 2 and "--force" in result.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in bundle.rglob("*")) == before


def test_profile_measures_apart(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = edgeomni("profile", bundle, "--seconds", "0.5", "--turns", "2", "--json", "--save")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["forced_frames"] == 117, "random weights answer a fixed length"
    assert set(report["stages"]) > {
        "mel",
        "encoder",
        "prefill",
        "frame.body",
        "frame.text_head",
        "frame.audio_head",
        "codec",
    }
    assert 20 < report["peak_rss_mb"] < 600, "the child holds the bundle, not torch"
    assert report["turn"]["rtf"] > 0 and report["turn"]["ttfa"] > 0
    saved = list((tmp_path / "profiles" / "results").glob("*-bundle-*.json"))
    assert len(saved) == 1 and json.loads(saved[0].read_text(encoding="utf-8")) == report


def test_init_writes_a_checkpoint_or_a_recipe(tmp_path: Path) -> None:
    arguments = ["init", "--preset", "tiny", "--random", "--seed", "7"]
    assert edgeomni(*arguments, "-o", tmp_path / "whole").exit_code == 0
    assert edgeomni(*arguments, "-o", tmp_path / "recipe", "--recipe").exit_code == 0
    assert edgeomni(*arguments, "-o", tmp_path / "whole").exit_code == 2
    answers = []
    for kind in ("whole", "recipe"):
        out = tmp_path / f"{kind}.npz"
        result = edgeomni("run", tmp_path / kind, "--text", "hello", "--max-length", "12", "--tokens-out", out)
        assert result.exit_code == 0, result.output
        answers.append(np.load(out)["tokens"])
    np.testing.assert_array_equal(*answers)


def test_a_reader_that_leaves_does_not_cost_the_sound_file(tiny_dir: Path, tmp_path: Path) -> None:
    question, answer = tmp_path / "question.wav", tmp_path / "answer.wav"
    soundfile.write(question, 0.2 * np.sin(np.arange(16000) * 0.05), 16000)
    command = [sys.executable, "-m", "edgeomni", "run", str(tiny_dir), str(question), "-o", str(answer)]
    child = subprocess.Popen([*command, "--max-length", "120"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    child.stdout.close()
    message = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait() == 0, message
    assert soundfile.info(answer).frames > 24000


def test_a_recorder_at_the_other_end_of_a_pipe(bundle: Path, folder: Path, tmp_path: Path) -> None:
    wav = (folder / "question.wav").read_bytes()
    samples = (soundfile.read(folder / "question.wav", dtype="int16")[0]).astype("<i2").tobytes()
    run = [sys.executable, "-m", "edgeomni", "run", str(bundle), "--max-seconds", "1", "--greedy", "-q"]
    raw = ["-", "--stdin-format", "s16le", "--stdin-rate", "16000"]
    told = edgeomni(*run[3:], folder / "question.wav", "-o", tmp_path / "file.wav")
    answers = [(told.stdout_bytes, (tmp_path / "file.wav").read_bytes())]
    for name, arguments, stdin in (("wav", ["-"], wav), ("raw", raw, samples)):
        out = tmp_path / f"{name}.wav"
        done = subprocess.run([*run, *arguments, "-o", str(out)], input=stdin, capture_output=True, check=False)
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        answers.append((done.stdout, out.read_bytes()))
    assert answers[0] == answers[1] == answers[2]
    assert soundfile.info(tmp_path / "raw.wav").frames <= 24000


def test_the_terminal_is_no_pipe(bundle: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "edgeomni", "run", str(bundle), "-"]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2 and "stdin is the terminal" in done.stderr


def test_sigterm_ends_an_export_with_nothing_left(tiny_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeomni", "export", str(tiny_dir), "-o", str(tmp_path / "bundle")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert child.stderr
    assert any(line.startswith("export: export encoder") for line in child.stderr), "the work has begun"
    child.terminate()
    message = child.communicate()[1]
    assert child.returncode == 128 + signal.SIGTERM and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
