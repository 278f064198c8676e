"""What signals and kills leave behind: nothing, or what the next output to the same folder clears away."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Child

from edgeomni import outputs, workspaces
from edgeomni.errors import UsageError

MAKER = """
import signal
from edgeomni import outputs, renames

kind, target, how = sys.argv[1:]
if how == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
if how == "own handler":
    signal.signal(signal.SIGTERM, lambda *_: print("own", flush=True))
if how == "between the two renames":
    renames._system_call = lambda: None
    rename_new = outputs.rename_new
    def paused(source, to):
        if not to.exists():
            pause("working")
        rename_new(source, to)
    outputs.rename_new = paused
if how == "after the exchange":
    exchange = outputs.exchange
    outputs.exchange = lambda a, b: exchange(a, b) and pause("working") is None
make = outputs.new_directory if kind == "directory" else outputs.new_file
with make(target, (lambda _: "") if kind == "directory" else True) as part:
    (part / "weights" if kind == "directory" else part).write_text("new")
    if how in ("nohup", "own handler", "", "slow end"):
        try:
            pause("working")
        except SystemExit:
            if how == "slow end":
                pause("ending")
            raise
"""


def working(kind: str, target: Path, how: str = "") -> Child:
    """A process that makes an output and stands still while it works on it, or at the point that `how` names."""
    child = Child(MAKER, kind, target, how)
    child.expect("working")
    return child


def older(folder: Path, kind: str) -> Path:
    """Something that lies under the name already."""
    target = folder / "out"
    if kind == "directory":
        target.mkdir()
        (target / "weights").write_text("older")
    else:
        target.write_text("older")
    return target


def text_of(target: Path) -> str:
    return (target / "weights" if target.is_dir() else target).read_text()


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_signal_leaves_nothing_and_ends_with_the_usual_code(tmp_path: Path, kind: str, number: int) -> None:
    target = older(tmp_path, kind)
    assert working(kind, target).end(number) == 128 + number
    assert os.listdir(tmp_path) == ["out"] and text_of(target) == "older"


def test_a_second_signal_does_not_cut_the_unwinding_short(tmp_path: Path) -> None:
    child = working("directory", tmp_path / "out", "slow end")
    child.process.send_signal(signal.SIGTERM)
    child.expect("ending")
    child.process.send_signal(signal.SIGTERM)
    child.process.send_signal(signal.SIGHUP)
    child.let_go()
    assert child.ended()[0] == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_nohup_and_the_application_s_own_handlers_stay(tmp_path: Path) -> None:
    child = working("file", tmp_path / "a", "nohup")
    child.process.send_signal(signal.SIGHUP)
    child.let_go()
    assert child.ended()[0] == 0
    child = working("file", tmp_path / "b", "own handler")
    child.process.send_signal(signal.SIGTERM)
    child.expect("own")
    child.let_go()
    assert child.ended()[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def handlers() -> list[Any]:
    return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]


def test_the_handlers_are_put_back(tmp_path: Path) -> None:
    before = handlers()
    with outputs.new_file(tmp_path / "a"):
        during = handlers()
        with outputs.new_file(tmp_path / "b"):
            assert handlers() == during
        assert handlers() == during
    assert handlers() == before and during[2] == before[2]
    assert during[0] != before[0] and during[1] != before[1]


def test_a_handler_that_the_application_sets_meanwhile_is_not_undone(tmp_path: Path) -> None:
    def own(number: int, frame: object) -> None: ...

    try:
        with outputs.new_file(tmp_path / "a"):
            signal.signal(signal.SIGTERM, own)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_other_threads_write_without_touching_signals(tmp_path: Path) -> None:
    seen = list[Any]()

    def work() -> None:
        with outputs.new_file(tmp_path / "a"):
            seen.extend(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == handlers() and os.listdir(tmp_path) == ["a"]


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_a_kill_leaves_is_swept_by_the_next_output(tmp_path: Path, kind: str) -> None:
    target = older(tmp_path, kind)
    assert working(kind, target).end(signal.SIGKILL) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2 and text_of(target) == "older"
    outputs.write_file(tmp_path / "next", b"")
    assert sorted(os.listdir(tmp_path)) == ["next", "out"] and text_of(target) == "older"


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_a_live_process_holds_is_not_swept(tmp_path: Path, kind: str) -> None:
    child = working(kind, tmp_path / "out")
    outputs.write_file(tmp_path / "next", b"")
    assert len(os.listdir(tmp_path)) == 2
    child.let_go()
    assert child.ended()[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["next", "out"] and text_of(tmp_path / "out") == "new"


def test_a_kill_between_the_two_renames_is_mended_at_the_next_start(tmp_path: Path) -> None:
    """Where the system cannot exchange two names."""
    target = older(tmp_path, "directory")
    working("directory", target, "between the two renames").end(signal.SIGKILL)
    assert not target.exists(), "the moment that this is about"
    with pytest.raises(UsageError, match="exists"), outputs.new_directory(target):
        raise AssertionError("the work does not even begin")
    assert os.listdir(tmp_path) == ["out"] and text_of(target) == "older"


def test_a_kill_after_an_exchange_leaves_the_new_one(tmp_path: Path) -> None:
    target = older(tmp_path, "directory")
    working("directory", target, "after the exchange").end(signal.SIGKILL)
    assert text_of(target) == "new"
    outputs.write_file(tmp_path / "next", b"")
    assert sorted(os.listdir(tmp_path)) == ["next", "out"] and text_of(target) == "new"


# --- hand-made workspaces -------------------------------------------------------------------------------------------


def dead(folder: Path, *parts: str, **owner: Any) -> Path:
    """A workspace such as a dead process leaves; `parts` of it are directories with a file."""
    work = folder / ".edgeomni-abcd1234"
    for part in parts:
        (work / part).mkdir(parents=True)
        (work / part / "weights").write_text(part)
    work.mkdir(exist_ok=True)
    (work / "lock").write_text(json.dumps({"target": "out", "machine": workspaces._machine(), **owner}))
    return work


def test_the_replaced_one_goes_with_its_workspace(tmp_path: Path) -> None:
    target = older(tmp_path, "directory")
    dead(tmp_path, "old")
    outputs.write_file(tmp_path / "next", b"")
    assert sorted(os.listdir(tmp_path)) == ["next", "out"] and text_of(target) == "older"


def test_one_that_was_not_replaced_goes_back(tmp_path: Path) -> None:
    dead(tmp_path, "old", "new")
    outputs.write_file(tmp_path / "next", b"")
    assert sorted(os.listdir(tmp_path)) == ["next", "out"] and text_of(tmp_path / "out") == "old"


def test_one_that_cannot_go_back_is_kept_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, work = older(tmp_path, "directory"), dead(tmp_path, "old", "new")
    with caplog.at_level(logging.WARNING, "edgeomni"):
        for name in ("next", "after"):
            outputs.write_file(tmp_path / name, b"")
    assert text_of(work / "old") == "old" and text_of(target) == "older"
    assert [r.message for r in caplog.records] == [
        f"{target}: could not get back its older contents; they are in {work / 'old'}"
    ]


@pytest.mark.parametrize("machine", [lambda own: own[:1], lambda own: ["another", *own[-1:]]])
def test_a_restart_or_another_container_is_the_same_machine(
    tmp_path: Path, machine: Callable[[list[str]], list[str]]
) -> None:
    dead(tmp_path, "new", machine=machine(workspaces._machine()))
    outputs.write_file(tmp_path / "next", b"")
    assert os.listdir(tmp_path) == ["next"]


def lock_is_a_pipe(work: Path) -> None:
    (work / "lock").unlink()
    os.mkfifo(work / "lock")


def lock_is_a_link(work: Path) -> None:
    (work / "lock").rename(work / "elsewhere")
    (work / "lock").symlink_to("elsewhere")


LOOKALIKES: dict[str, Callable[[Path], object]] = {
    "without a lock": lambda work: (work / "lock").unlink(),
    "a lock without a word": lambda work: (work / "lock").write_text(""),
    "a lock of something else": lambda work: (work / "lock").write_text("pid 17"),
    "another kind of JSON": lambda work: (work / "lock").write_text('["out"]'),
    "without a target": lambda work: (work / "lock").write_text(json.dumps({"machine": workspaces._machine()})),
    "a target elsewhere": lambda work: dead(work.parent, target="../out"),
    "of another machine": lambda work: dead(work.parent, machine=["another", "boot"]),
    "a pipe for a lock": lock_is_a_pipe,
    "a link for a lock": lock_is_a_link,
    "another name": lambda work: work.rename(work.with_name(".other-abcd1234")),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_what_only_looks_like_a_dead_workspace_is_left_alone(tmp_path: Path, case: str) -> None:
    LOOKALIKES[case](dead(tmp_path, "new"))
    before = sorted(tmp_path.rglob("*"))
    outputs.write_file(tmp_path / "next", b"")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "next"])


def test_a_link_to_a_dead_workspace_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    work = dead(tmp_path / "elsewhere", "new")
    (tmp_path / "here" / work.name).symlink_to(work)
    outputs.write_file(tmp_path / "here" / "next", b"")
    assert (work / "new" / "weights").exists()


def test_workspaces_of_other_users_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = dead(tmp_path, "new")
    monkeypatch.setattr(os, "geteuid", lambda: work.stat().st_uid + 1)
    outputs.write_file(tmp_path / "next", b"")
    assert (work / "new").exists()


def test_without_locks_nothing_is_swept_and_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, and on file systems that know no locks."""

    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    work = dead(tmp_path, "new")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    outputs.write_file(tmp_path / "a", b"")
    monkeypatch.setattr(workspaces, "fcntl", None)
    outputs.write_file(tmp_path / "b", b"")
    assert sorted(os.listdir(tmp_path)) == [work.name, "a", "b"]


def test_a_workspace_without_locks_is_not_for_others_to_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "fcntl", None)
    with outputs.new_file(tmp_path / "a"):
        monkeypatch.undo()
        outputs.write_file(tmp_path / "b", b"")
        assert len(os.listdir(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
