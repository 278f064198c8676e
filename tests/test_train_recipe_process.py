"""Commands of training recipes as real processes: how they end, who is told of signals, and one whole recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training import figures_in

from edgeomni.errors import UsageError
from edgeomni.model import checkpoints
from edgeomni.text import Tokenizer
from edgeomni.train.recipe_process import alone_in, ended, run_command

RECIPE = """
title = "an ear, from nothing"
[files]
"ear.toml" = '''
checkpoint = "start"
stage = "ctc"
[data]
train = ["my speech/train.jsonl"]
[optimizer]
steps = 40
batch = 2
[loss]
ctc_units = "words"
[run]
log_every = 1
save_every = 2
'''
[[steps]]
name = "speech"
run = "data synth --recipe nano --samples 6 -o 'my speech'"
makes = "my speech"
[[steps]]
name = "start"
run = "init --preset nano --random --words 'my speech/train.jsonl' --half -o start"
makes = "start"
[[steps]]
name = "ear"
run = "train ear.toml -o ear"
makes = "ear"
"""
WAITS = "#!/bin/sh\ntrap '{}' {}\necho $$ > ready\nwhile :; do sleep 0.1; done\n"
"""A script that waits for a signal."""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script in Python's place, which gets the words that Python would get; it is to be written by the test."""
    path = tmp_path / "python"
    path.touch()
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_the_command_runs_in_the_folder_with_its_words_as_they_are(program: Path, tmp_path: Path) -> None:
    program.write_text('#!/bin/sh\npwd > told; for word in "$@"; do echo "<$word>" >> told; done\n')
    (tmp_path / "folder").mkdir()
    assert run_command(["data", "synth", "-o", "my data", "*"], tmp_path / "folder") == 0
    told = (tmp_path / "folder" / "told").read_text().splitlines()
    assert told == [str(tmp_path / "folder"), "<-m>", "<edgeomni>", "<data>", "<synth>", "<-o>", "<my data>", "<*>"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "ended with exit code 3"),
        ("kill -KILL $$", "was killed by SIGKILL, perhaps because memory ran out"),
        ("kill -TERM $$", "was killed by SIGTERM"),
    ],
)
def test_how_a_command_ended(script: str, said: str, program: Path, tmp_path: Path) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    assert ended(run_command(["train"], tmp_path)) == said


def test_a_signal_that_has_no_name() -> None:
    assert ended(-200) == "was killed by signal 200"


@pytest.mark.parametrize("script", ["exit 130", "kill -INT $$"])
def test_a_command_that_ctrl_c_alone_ended_ends_the_recipe_too(script: str, program: Path, tmp_path: Path) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(KeyboardInterrupt):
        run_command(["train"], tmp_path)


def pid_in(path: Path) -> int:
    """The process id that a script writes when it is ready."""
    while not path.exists() or not path.read_text().strip():
        time.sleep(0.01)
    return int(path.read_text())


def main_thread_waits() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and frame.f_code is not subprocess.Popen.wait.__code__:
        frame = frame.f_back
    return frame is not None


def signalled(number: int, *, child_too: bool, tmp_path: Path) -> int:
    """Sends a signal to this process (and the command) when the one waits for the other; returns the command's id."""
    found = []

    def send() -> None:
        found.append(pid_in(tmp_path / "ready"))
        while not main_thread_waits():
            time.sleep(0.01)
        for pid in [os.getpid(), *(found if child_too else [])]:
            os.kill(pid, number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        run_command(["train"], tmp_path)
    finally:
        thread.join()
    return found[0]


def test_ctrl_c_leaves_the_command_time_to_put_its_things_in_order(program: Path, tmp_path: Path) -> None:
    program.write_text(WAITS.format("sleep 1; touch ended; exit 130", "INT"))
    with pytest.raises(KeyboardInterrupt):
        signalled(signal.SIGINT, child_too=True, tmp_path=tmp_path)
    assert (tmp_path / "ended").exists()


def test_sigterm_ends_the_command_as_well(program: Path, tmp_path: Path) -> None:
    program.write_text(WAITS.format("touch ended; exit 143", "TERM"))
    with pytest.raises(SystemExit) as caught:
        signalled(signal.SIGTERM, child_too=False, tmp_path=tmp_path)
    assert caught.value.code == 143 and (tmp_path / "ended").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid_in(tmp_path / "ready"), 0)


def test_a_command_that_outlives_its_killed_parent_still_holds_the_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edgeomni.train.recipe_process import alone_in, run_command\n"
        "sys.executable = sys.argv[1]\n"
        "with alone_in(Path('.')): run_command(['train'], Path('.'))\n"
    )
    stand_in = tmp_path / "stand-in"
    stand_in.write_text("#!/bin/sh\necho $$ > ready\nexec sleep 60\n")
    stand_in.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", script, str(stand_in)], cwd=folder)
    child = pid_in(folder / "ready")
    parent.kill()
    parent.wait()
    with pytest.raises(UsageError, match="another process is at work in it"), alone_in(folder):
        pass
    os.kill(child, signal.SIGKILL)
    for _ in range(500):
        try:
            with alone_in(folder):
                return
        except UsageError:
            time.sleep(0.01)
    raise AssertionError("the lock outlived the command")


TWO = """
import sys; from pathlib import Path; from edgeomni.train.recipe import Step, TrainingRecipe, follow_recipe
steps = [Step(name, name, f"export ckpt -o {name}") for name in ("one", "two")]
sys.executable = sys.argv[1]
follow_recipe(TrainingRecipe("", steps), "out", print, jobs=2)
"""


@pytest.mark.parametrize(("number", "group"), [("INT", True), ("TERM", False)])
def test_both_of_two_commands_put_their_things_in_order(number: str, group: bool, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal; SIGTERM only the one that it is sent to."""
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(
        f"#!/bin/sh\ntrap 'sleep 1; touch ended-$6; exit 1' {number}\necho hello; echo $$ > ready-$6\n"
        "while :; do sleep 0.1; done\n"
    )
    stand_in.chmod(0o755)
    command, pipe = [sys.executable, "-c", TWO, str(stand_in)], subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stderr=pipe, text=True, start_new_session=True) as parent:
        for name in ("one", "two"):
            pid_in(tmp_path / "out" / f"ready-{name}")
        (os.killpg if group else os.kill)(parent.pid, getattr(signal, f"SIG{number}"))
        said = parent.communicate(timeout=60)[1]
    assert parent.returncode != 0 and "[one] hello\n" in said and "[two] hello\n" in said
    assert {path.name for path in (tmp_path / "out").glob("ended-*")} == {"ended-one", "ended-two"}
    assert json.loads((tmp_path / "out" / "steps.json").read_text()) == {}


SLOW = """
import subprocess, time
class Slow(subprocess.Popen):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        time.sleep(1.5)
subprocess.Popen = Slow
"""
"""A thread that starts a command goes on long after the command has begun."""


UNNOTICED = """
import signal, threading, time
from pathlib import Path
def tell():
    while not all(Path("out", f"told-{name}").exists() for name in ("one", "two")):
        time.sleep(0.01)
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=tell, daemon=True).start()
"""
"""SIGTERM comes to another thread than the main one, which therefore sleeps on in what it waits for."""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_that_does_not_wake_the_main_thread_is_noticed(jobs: int, tmp_path: Path) -> None:
    stand_in = tmp_path / "stand-in"
    stand_in.write_text("#!/bin/sh\ntouch told-$6\nexec sleep 300\n" if jobs == 2 else ALONE)
    stand_in.chmod(0o755)
    command = [sys.executable, "-c", UNNOTICED + TWO.replace("jobs=2", f"jobs={jobs}"), str(stand_in)]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert parent.wait(timeout=60) != 0
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()


ALONE = "#!/bin/sh\ntouch told-one told-two\nexec sleep 300\n"


def test_commands_that_have_only_just_begun_are_ended_too(tmp_path: Path) -> None:
    stand_in = tmp_path / "stand-in"
    stand_in.write_text("#!/bin/sh\necho $$ > ready-$6\nexec sleep 300\n")
    stand_in.chmod(0o755)
    command = [sys.executable, "-c", SLOW + TWO, str(stand_in)]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        children = [pid_in(tmp_path / "out" / f"ready-{name}") for name in ("one", "two")]
        parent.terminate()
        assert parent.wait(timeout=60) != 0
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_whole_recipe_that_is_interrupted_once(tmp_path: Path) -> None:
    """Real commands: Ctrl-C in the middle of training ends with 130 and no traceback, and the same command goes on."""
    (tmp_path / "ear recipe.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "edgeomni", "train", "--recipe", "ear recipe.toml", "-o", "out"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stderr=pipe, text=True, start_new_session=True) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("train: step 1/40"):
                states = tmp_path / "out" / "ear" / "states"
                while process.poll() is None and not list(states.glob("*/complete")):
                    time.sleep(0.02)
                os.killpg(process.pid, signal.SIGINT)
                break
        said += process.stderr.readlines()
    text = "".join(said)
    assert process.returncode == 130, text
    assert "Traceback" not in text and "interrupted" in text
    assert list(json.loads((tmp_path / "out" / "steps.json").read_text())) == ["speech", "start"]

    done = subprocess.run(command, cwd=tmp_path, stderr=pipe, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2 of 3, start: done already\nstep 3 of 3, ear: edgeomni train ear.toml -o ear --resume" in done.stderr
    assert "train: step 1/40" not in done.stderr
    assert [line["step"] for line in figures_in(tmp_path / "out" / "ear")] == list(range(1, 41))
    model = checkpoints.load(tmp_path / "out" / "ear")
    tokenizer = Tokenizer(model.tokenizer_json, model.spec.layout)
    rows = [json.loads(line) for line in (tmp_path / "out" / "my speech" / "train.jsonl").read_text().splitlines()]
    for row in rows:  # all words of the data are known
        assert tokenizer.decode(tokenizer.encode(row["text"])) == row["text"]
