"""The command line: spellings, exit codes, messages, where output goes. The engine behind it is scripted."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from fakes import script, small_bundle, small_spec

from edgeomni import Session
from edgeomni.cli import main
from edgeomni.errors import BundleError, GateError
from edgeomni.install_hint import install_command
from edgeomni.runtimes import fake
from edgeomni.spec import OmniSpec, Task

COMMANDS = ["init", "data", "train", "train-codec", "compare-runs", "merge", "export", "combine"]
COMMANDS += ["run", "inspect", "verify", "profile", "evaluate", "demo", "doctor"]
DATA_COMMANDS = ["check", "prepare", "synth"]
FRAMES = 20


def edgeomni(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.fixture
def question(tmp_path: Path) -> str:
    path = tmp_path / "question.wav"
    soundfile.write(path, np.sin(np.arange(1600) / 5) * 0.3, 16000)
    return str(path)


@pytest.fixture
def spec() -> OmniSpec:
    return small_spec()


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch, spec: OmniSpec) -> Iterator[list[dict[str, Any]]]:
    """Session.open gives scripted components; the arguments of respond are recorded."""
    asked: list[dict[str, Any]] = []
    session = Session(fake.components(spec, script(spec, FRAMES)), spec, None)
    respond = session.respond

    def record(task: Task, audio: Any = None, text: str | None = None, **how: Any) -> Any:
        asked.append({"task": task, "audio": audio, "text": text, **how})
        return respond(task, audio, text, **how)

    monkeypatch.setattr(session, "respond", record)
    monkeypatch.setattr(Session, "open", lambda *args, **how: session)
    yield asked


def test_help_lists_every_command() -> None:
    result = edgeomni("--help")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.split("Commands:")[1].splitlines() if line.strip()] == COMMANDS
    for name in COMMANDS:
        assert edgeomni(name, "--help").exit_code == 0
    listed = edgeomni("data", "--help").output.split("Commands:")[1]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == DATA_COMMANDS
    for name in DATA_COMMANDS:
        assert edgeomni("data", name, "--help").exit_code == 0


def test_run_streams_text_and_writes_audio(tmp_path: Path, question: str, spec: OmniSpec) -> None:
    out = tmp_path / "answer.wav"
    result = edgeomni("run", "b", "--task", "aa", question, "-o", str(out))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "<1><2><3>\n"
    assert "the model ended its answer; 20 frames" in result.stderr and "RTF" in result.stderr
    info = soundfile.info(out)
    frames = FRAMES - spec.layout.streams
    assert (info.samplerate, info.channels, info.frames) == (24000, 1, frames * spec.codec.frame_samples)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer.wav", "question.wav"], "no half files"


def test_run_writes_the_same_sound_raw(tmp_path: Path, question: str) -> None:
    out = tmp_path / "answer.wav"
    assert edgeomni("run", "b", question, "-o", str(out)).exit_code == 0
    raw = edgeomni("run", "b", question, "-o", "-")
    assert raw.exit_code == 0 and "<1><2><3>" in raw.stderr
    expected, _ = soundfile.read(out, dtype="int16")
    np.testing.assert_array_equal(np.frombuffer(raw.stdout_bytes, "<i2"), expected)


def test_run_refuses_existing_output_without_force(tmp_path: Path, question: str) -> None:
    out = tmp_path / "answer.wav"
    out.write_bytes(b"mine")
    result = edgeomni("run", "b", question, "-o", str(out))
    assert result.exit_code == 2 and "exists" in result.stderr and "--force" in result.stderr
    assert out.read_bytes() == b"mine"
    assert edgeomni("run", "b", question, "-o", str(out), "--force").exit_code == 0
    assert soundfile.info(out).frames > 0


@pytest.mark.parametrize("name", ["answer.flac", "answer.ogg", "answer.mp3"])
def test_run_encodes_what_the_suffix_says(tmp_path: Path, question: str, name: str) -> None:
    for out in ("answer.wav", name):
        assert edgeomni("run", "b", question, "-o", str(tmp_path / out)).exit_code == 0
    (expected, rate), (heard, same_rate) = soundfile.read(tmp_path / "answer.wav"), soundfile.read(tmp_path / name)
    assert rate == same_rate and heard.shape == expected.shape
    assert soundfile.info(tmp_path / name).format == name.split(".")[1].upper()


def appearing(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Files that appear while the answer is under way."""
    decode = fake.FakeCodec.decode

    def late(*args: Any) -> Any:
        for path in paths:
            path.write_bytes(b"mine")
        return decode(*args)

    monkeypatch.setattr(fake.FakeCodec, "decode", late)


@pytest.mark.parametrize(("option", "name"), [("-o", "a.wav"), ("--tokens-out", "a.npz")])
def test_run_does_not_overwrite_what_appears_during_the_answer(
    tmp_path: Path, question: str, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    out = tmp_path / name
    appearing(monkeypatch, out)
    result = edgeomni("run", "b", question, option, str(out))
    assert result.exit_code == 2 and ("appeared meanwhile" if option == "-o" else "exists") in result.stderr
    assert out.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == [name, "question.wav"]


def test_run_overwrites_with_force_what_appears_during_the_answer(
    tmp_path: Path, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, tokens = tmp_path / "a.wav", tmp_path / "a.npz"
    appearing(monkeypatch, sound, tokens)
    args = ["-o", str(sound), "--tokens-out", str(tokens), "--force"]
    assert edgeomni("run", "b", question, *args).exit_code == 0
    assert soundfile.info(sound).frames > 0 and len(np.load(tokens)["tokens"])


@pytest.mark.parametrize("exists", [False, True])
def test_run_refuses_one_file_for_two_outputs(tmp_path: Path, question: str, exists: bool) -> None:
    sound, tokens = tmp_path / "a.wav", tmp_path / "a.npz"
    tokens.symlink_to("a.wav")
    if exists:
        sound.write_bytes(b"mine")
    result = edgeomni("run", "b", question, "-o", str(sound), "--tokens-out", str(tokens), "--force")
    assert result.exit_code == 2 and "are the same file" in result.stderr
    assert sound.exists() == exists and tokens.is_symlink()


def test_run_writes_through_links_and_pipes(tmp_path: Path, question: str) -> None:
    real, link, pipe = tmp_path / "real.wav", tmp_path / "link.wav", tmp_path / "pipe"
    real.write_bytes(b"old")
    link.symlink_to("real.wav")
    assert edgeomni("run", "b", question, "-o", str(link), "--force").exit_code == 0
    assert link.is_symlink() and soundfile.info(real).frames > 0
    os.mkfifo(pipe)
    got = list[bytes]()
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert edgeomni("run", "b", question, "-o", str(pipe)).exit_code == 0
    reader.join()
    assert pipe.is_fifo() and got[0][44:] == real.read_bytes()[44:]


def test_init_needs_the_name_of_an_output() -> None:
    result = edgeomni("init", "--preset", "tiny", "--random", "-o", "")
    assert result.exit_code == 2 and "cannot be the name of an output" in result.stderr


@pytest.mark.parametrize("option", ["model_config.yaml", "lit_model.pth"])
def test_init_does_not_take_a_folder_for_a_checkpoint(tmp_path: Path, option: str) -> None:
    (tmp_path / option).write_text("mine")
    (tmp_path / "thesis.txt").write_text("mine")
    for recipe in ([], ["--recipe"]):
        result = edgeomni("init", "--preset", "tiny", "--random", "-o", str(tmp_path), "--force", *recipe)
        assert result.exit_code == 2 and "is no checkpoint that EdgeOmni wrote" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_run_saves_tokens(tmp_path: Path, question: str, spec: OmniSpec) -> None:
    out = tmp_path / "t.npz"
    assert edgeomni("run", "b", question, "--tokens-out", str(out)).exit_code == 0
    tokens = np.load(out)["tokens"]
    assert tokens.dtype == np.int32 and tokens.shape == (spec.layout.streams + 1, FRAMES)
    np.testing.assert_array_equal(tokens[:-1].T, np.array(script(spec, FRAMES))[:FRAMES, :-1])
    assert edgeomni("run", "b", question, "--task", "asr", "--tokens-out", str(out), "--force").exit_code == 0
    np.testing.assert_array_equal(np.load(out)["tokens"], [1, 2, 3])


def test_an_answer_shorter_than_the_delay_is_empty_audio(
    tmp_path: Path, question: str, spec: OmniSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(fake.components(spec, script(spec, 4)), spec, None)
    monkeypatch.setattr(Session, "open", lambda *args, **how: session)
    out = tmp_path / "answer.wav"
    result = edgeomni("run", "b", question, "-o", str(out))
    assert result.exit_code == 0, result.stderr
    assert soundfile.info(out).frames == 0


def test_run_hands_its_options_on(question: str, scripted: list[dict[str, Any]]) -> None:
    args = ["--task", "aa", question, "--one-row", "--max-length", "40", "--seed", "3", "--encoder-window", "10"]
    args += ["--long", "split", "--strict", "--codec-noise", "5", "--channel", "0", "--repetition-penalty", "1.2"]
    assert edgeomni("run", "b", *args).exit_code == 0
    asked = scripted[-1]
    assert (asked["two_row"], asked["max_length"], asked["strict"], asked["noise_seed"]) == (False, 40, True, 5)
    assert (asked["encoder_window"], asked["long_audio"], asked["channel"]) == (10.0, "split", 0)
    assert (asked["sampling"].seed, asked["sampling"].repetition_penalty) == (3, 1.2)
    assert asked["sampling"].deterministic, "top-k 1 is the published default"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--greedy", "--temperature", "2"], {"greedy": True}),
        (["--temperature", "0.7"], {"temperature": 0.7, "top_k": 0}),
        (["--top-p", "0.9"], {"top_p": 0.9, "top_k": 0}),
        (["--temperature", "0.7", "--top-k", "5"], {"temperature": 0.7, "top_k": 5}),
    ],
)
def test_sampling_options(
    question: str, scripted: list[dict[str, Any]], args: list[str], expected: dict[str, Any]
) -> None:
    assert edgeomni("run", "b", question, *args).exit_code == 0
    assert expected.items() <= dataclasses.asdict(scripted[-1]["sampling"]).items()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run"], "Missing argument"),
        (["run", "b"], "give a sound file"),
        (["run", "b", "--task", "tt"], "--text"),
        (["run", "b", "q.wav", "--task", "ta", "--text", "x"], "not a sound file"),
        (["run", "b", "q.wav", "--text", "x"], "takes a sound file"),
        (["run", "b", "q.wav", "--task", "sing"], "sing"),
        (["run", "b", "q.wav", "--temperature", "-1"], "temperature"),
        (["run", "b", "q.wav", "--encoder-window", "wide"], "auto or seconds"),
        (["run", "b", "q.wav", "--tokens-out", "t.txt"], ".npz"),
        (["run", "b", "q.wav", "-o", "no/such/folder/a.wav"], "no such directory"),
        (["run", "b", "q.wav", "-o", ""], "-o is empty"),
        (["run", "b", "q.wav", "--tokens-out", ""], "--tokens-out is empty"),
        (["run", "b", "q.wav", "-o", "a.npz", "--tokens-out", "a.npz"], "end the name in .wav, .flac, .ogg, .mp3"),
        (["run", "b", "q.wav", "-o", "a.aac"], "end the name in .wav, .flac, .ogg, .mp3"),
        (["export", "c", "-o", ""], "cannot be the name of an output"),
        (["demo", "-o", ""], "cannot be the name of an output"),
        (["run", "b", "q.wav", "--max-length", "0"], "max-length"),
        (["sing"], "No such command"),
        (["init", "-o", "c"], "--encoder, --llm and --codec"),
        (["init", "--preset", "tiny", "-o", "c"], "say --random"),
        (["init", "--random", "-o", "c"], "needs --preset"),
        (["init", "--preset", "tiny", "--random", "--llm", "x", "-o", "c"], "leave --llm out"),
        (["export", "-o", "b"], "CHECKPOINT"),
        (["export", "c", "--preset", "tiny", "--random", "-o", "b"], "not both"),
        (["export", "c", "-o", "b", "--llm", "onnx:int2"], "int2"),
        (["export", "c", "-o", "b", "--llm", "tflite:int4"], "tflite"),
        (["export", "c", "-o", "b", "--format", "tflite"], "tflite"),
        (["export", "c", "-o", "b", "--encoder", "onnx:int4"], "int8"),
        (["export", "c", "-o", "b", "--codec", "onnx:int8"], "fp32 or fp16"),
        (["export", "c", "-o", "b", "--gate", "llm.top1"], "llm.top1"),
        (["export", "c", "-o", "b", "--gate", "llm.charm=1"], "llm.charm"),
    ],
)
def test_usage_errors_exit_2_and_say_what_to_do(args: list[str], said: str) -> None:
    result = edgeomni(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    assert said in result.stderr


def test_errors_exit_with_their_code_and_one_line(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    def fail(error: Exception) -> Result:
        def broken(*args: Any, **how: Any) -> None:
            raise error

        monkeypatch.setattr(Session, "open", broken)
        return edgeomni("run", "b", question)

    for error, code, said in [
        (BundleError("no bundle here"), 1, "no bundle here"),
        (GateError("too slow"), 3, "too slow"),
        (OSError(28, "No space left on device", "x.wav"), 1, "x.wav: No space left on device"),
        (ValueError("surprise"), 1, "--debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ]:
        result = fail(error)  # type: ignore[arg-type]
        assert result.exit_code == code, error
        assert said in result.stderr and "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    def broken(*args: Any, **how: Any) -> None:
        raise BundleError("no bundle here")

    monkeypatch.setattr(Session, "open", broken)
    result = edgeomni("--debug", "run", "b", question)
    assert isinstance(result.exception, BundleError)


def test_interrupted_run_leaves_no_file(tmp_path: Path, question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake.FakeCodec, "decode", stop)
    out = tmp_path / "answer.wav"
    assert edgeomni("run", "b", question, "-o", str(out)).exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["question.wav"]


def test_text_tasks_write_no_audio(tmp_path: Path, question: str) -> None:
    out = tmp_path / "a.wav"
    result = edgeomni("run", "b", question, "--task", "at", "-o", str(out))
    assert result.exit_code == 0 and not out.exists()
    assert "warning" in result.stderr and result.stdout == "<1><2><3>\n"


@pytest.fixture
def bundle(tmp_path: Path, spec: OmniSpec) -> Path:
    """A bundle that no engine could run: enough to inspect and verify."""
    return small_bundle(tmp_path / "bundle", spec)


def test_inspect_shows_everything(bundle: Path) -> None:
    shown = edgeomni("inspect", str(bundle)).output
    for word in ("encoder", "onnxruntime", "int8", "llm.top1", "0.999", "pass", "random", "Apache-2.0", "y.*"):
        assert word in shown, word
    data = json.loads(edgeomni("inspect", str(bundle), "--json").output)
    assert data["size"] == 5 * 150 + 2 * 4 + 2 and set(data["components"]) == {"encoder", "llm", "codec"}


def test_verify_finds_a_flipped_byte(bundle: Path) -> None:
    assert edgeomni("verify", str(bundle)).exit_code == 0
    path = bundle / "llm" / "body.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    result = edgeomni("verify", str(bundle))
    assert result.exit_code == 1 and "llm/body.onnx" in result.stderr
    assert edgeomni("verify", str(bundle.parent / "gone")).exit_code == 1


def test_doctor_tells_versions_and_what_to_install() -> None:
    report = json.loads(edgeomni("doctor", "--json").output)
    assert report["engines"]["onnxruntime"]["version"]
    assert "CPUExecutionProvider" in report["providers"]
    assert report["tools"]["sounddevice"]["install"] == install_command("play")
    assert report["machine"]["cores"] >= 1
    assert "onnxruntime" in edgeomni("doctor").output


def test_a_missed_budget_exits_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeomni.profiling import measure

    monkeypatch.setattr(measure, "measure_apart", measure.measure)
    monkeypatch.chdir(tmp_path)
    args = ["profile", "b", "--seconds", "0.5", "--turns", "1", "--warmup", "0"]
    assert edgeomni(*args, "--profile", "x86-avx2", "--save").exit_code in (0, 3)
    assert len(list((tmp_path / "profiles" / "results").glob("*.json"))) == 1
    strict = (Path(__file__).resolve().parent.parent / "profiles" / "x86-avx2.toml").read_text(encoding="utf-8")
    (tmp_path / "strict.toml").write_text(strict.replace("ttfa_s = 2.0", "ttfa_s = 1e-9"), encoding="utf-8")
    result = edgeomni(*args, "--profile", "strict.toml", "--json")
    assert result.exit_code == 3 and "ttfa_s" in result.stderr
    assert json.loads(result.stdout)["turn"]["ttfa"] > 0, "the figures are told, missed or not"
