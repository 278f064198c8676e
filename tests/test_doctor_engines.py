"""`edgeomni doctor`: which engines can compute here, asked in processes that may crash or stand still."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeomni.cli import doctor, main, usable
from edgeomni.engines import CHECKPOINT, ENGINES, Engine
from edgeomni.runtimes import problem, runtime_of

OF_BUNDLES = [engine for engine in ENGINES.values() if engine.formats != (CHECKPOINT,)]


def child(code: str) -> Any:
    """What `usable._ask` starts: a process that runs `code` instead of the probe."""
    return lambda name: subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("engine", OF_BUNDLES, ids=lambda engine: engine.name)
def test_every_engine_tells_its_problem_with_every_device(engine: Engine) -> None:
    assert callable(runtime_of(engine).problem)
    for device in engine.devices:
        said = problem(engine, device)
        assert isinstance(said, str) and "\n" not in said
        assert not said or any(words in said for words in ("install", "build", "use", "check", "driver")), said


def test_a_folder_without_a_problem_has_none_and_one_that_cannot_be_loaded_has(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Engine("phantom", "phantom", ("phantom",), ("cuda",), "", ("phantom",))
    said = problem(line, "cuda")
    assert "phantom is not installed or cannot be loaded" in said and "pip install" in said
    monkeypatch.setitem(sys.modules, "edgeomni.runtimes.phantom", type(sys)("phantom"))
    assert problem(line, "cuda") == ""


def test_the_probe_answers_as_the_engine_does() -> None:
    (engine,) = [e for e in OF_BUNDLES if e.name == "onnxruntime"]
    told = usable.usable([engine])["onnxruntime"]
    assert told == {device: problem(engine, device) for device in engine.devices} and told["cpu"] == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it ended its process with SIGSEGV"),
        ("import sys; sys.exit('no such library')", "no such library"),
        ("import os; os._exit(7)", "exit code 7"),
        ("print('hello')", "exit code 0"),
        ("print('[1]')", "exit code 0"),
        ("import time; time.sleep(60)", "does not answer within 0.5 s"),
    ],
)
def test_an_engine_that_crashes_or_stands_still_takes_nothing_with_it(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usable, "_ask", child(code))
    timeout = 0.5 if "sleep" in code else 60.0
    (told,) = usable.usable(OF_BUNDLES[:1], timeout).values()
    assert set(told) == set(OF_BUNDLES[0].devices) and all(said in reason for reason in told.values())


def test_doctor_tells_what_works_what_does_not_and_what_is_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {e.name: {d: "" if d == "cpu" else f"{d} is gone; install it" for d in e.devices} for e in OF_BUNDLES}
    monkeypatch.setattr(doctor, "usable", lambda engines: {e.name: states[e.name] for e in engines})
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    told = report["engines"]["onnxruntime"]["devices"]
    assert told["cpu"] == {"problem": "", "untested": False}
    assert told["tensorrt"] == {"problem": "tensorrt is gone; install it", "untested": True}
    assert report["engines"]["torch"]["devices"] is None
    uses = {name: part["use"] for name, part in report["engines"].items()}
    assert uses["onnxruntime"] == "runs bundles in onnx, tensorrt on cpu or cuda or tensorrt"
    assert uses["torch"] == "runs checkpoints on cpu or cuda"
    shown = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"}).output
    assert "cpu: yes, cuda: no, tensorrt: no (untested on a GPU)" in shown and "not asked" in shown
    assert "onnxruntime on cuda: cuda is gone; install it" in shown
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    shown = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"}).output
    assert "cuda and tensorrt: this machine shows no GPU of NVIDIA" in shown and "cuda is gone" not in shown


def test_two_packages_of_one_engine_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable", lambda engines: {})
    monkeypatch.setattr(doctor, "installed_version", lambda names: "1.0")
    shown = CliRunner().invoke(main, ["doctor"]).output
    assert "note: onnxruntime and onnxruntime-gpu are both installed and write the same folder" in shown
    assert "1.0" in shown and "not found" not in shown
    monkeypatch.setattr(doctor, "installed_version", lambda names: "1.0" if "onnxruntime" in names else "")
    shown = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"}).output
    assert "both installed" not in shown and "not found" in shown
    assert "for llama.cpp:" in shown and ENGINES["llama.cpp"].install in shown and "for onnxruntime:" not in shown


def test_a_gpu_is_found_by_what_its_driver_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeomni import hardware

    monkeypatch.setattr(hardware, "_NVIDIA", (str(tmp_path / "nvgpu"), str(tmp_path / "nvidiactl")))
    assert not hardware.has_nvidia_gpu()
    (tmp_path / "nvidiactl").touch()
    assert hardware.has_nvidia_gpu()
