"""Exclusive renames and exchanges, by the system's own call and by the portable way round it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from children import Child

from edgeomni import renames

Make = Callable[[Path, str], None]


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_directory(path: Path, text: str) -> None:
    path.mkdir()
    (path / "inside").write_text(text)


def text_of(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


def no_hard_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["the system's call", "none", "unknown to the file system", "none, no hard links"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way that `rename_new` may have to take."""
    if request.param.startswith("none"):
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    if request.param.startswith("unknown"):
        monkeypatch.setitem(renames._LINUX, "new", 1 << 20)  # a flag that no kernel knows: EINVAL
        monkeypatch.setitem(renames._MACOS, "new", 1 << 20)
    if request.param.endswith("no hard links"):
        monkeypatch.setattr(os, "link", no_hard_links)
    return str(request.param)


@pytest.mark.parametrize("make", [make_file, make_directory])
def test_a_free_name_is_taken(tmp_path: Path, way: str, make: Make) -> None:
    make(tmp_path / "a", "new")
    renames.rename_new(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"] and text_of(tmp_path / "b") == "new"


def occupy(path: Path, kind: str) -> None:
    if kind == "link":
        path.symlink_to("nowhere")
    elif kind == "empty directory":
        path.mkdir()
    else:
        (make_file if kind == "file" else make_directory)(path, "old")


@pytest.mark.parametrize("there", ["file", "directory", "empty directory", "link"])
@pytest.mark.parametrize("make", [make_file, make_directory])
def test_a_taken_name_is_left_alone(tmp_path: Path, way: str, make: Make, there: str) -> None:
    make(tmp_path / "a", "new")
    occupy(tmp_path / "b", there)
    with pytest.raises(FileExistsError):
        renames.rename_new(tmp_path / "a", tmp_path / "b")
    assert text_of(tmp_path / "a") == "new"
    if there in ("file", "directory"):
        assert text_of(tmp_path / "b") == "old"
    assert (tmp_path / "b").is_symlink() == (there == "link")


def test_what_is_put_into_the_reserved_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        (target / "letter.txt").write_text("mine")
        rename(source, target)

    monkeypatch.setattr(renames, "_system_call", lambda: None)
    monkeypatch.setattr(os, "rename", late)
    make_directory(tmp_path / "a", "new")
    with pytest.raises(FileExistsError):
        renames.rename_new(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "letter.txt").read_text() == "mine" and text_of(tmp_path / "a") == "new"


def test_a_reserved_name_is_given_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_system_call", lambda: None)
    monkeypatch.setattr(os, "rename", no_hard_links)
    make_directory(tmp_path / "a", "new")
    with pytest.raises(PermissionError):
        renames.rename_new(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_other_failures_are_told(tmp_path: Path) -> None:
    make_file(tmp_path / "a", "new")
    with pytest.raises(FileNotFoundError):
        renames.rename_new(tmp_path / "gone", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        renames.rename_new(tmp_path / "a", tmp_path / "gone" / "b")
    with pytest.raises(FileNotFoundError):
        renames.exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_an_exchange_swaps_whatever_lies_there(tmp_path: Path) -> None:
    make_file(tmp_path / "a", "one")
    make_directory(tmp_path / "b", "two")
    assert renames.exchange(tmp_path / "a", tmp_path / "b") is (sys.platform in ("linux", "darwin"))
    assert (text_of(tmp_path / "a"), text_of(tmp_path / "b")) == ("two", "one")


def test_an_exchange_that_the_system_lacks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_system_call", lambda: None)
    make_file(tmp_path / "a", "one")
    make_file(tmp_path / "b", "two")
    assert renames.exchange(tmp_path / "a", tmp_path / "b") is False
    assert (text_of(tmp_path / "a"), text_of(tmp_path / "b")) == ("one", "two")


RACER = """
from pathlib import Path
from edgeomni import renames
if sys.argv[3] == "portable":
    renames._system_call = lambda: None
pause("ready")
try:
    renames.rename_new(Path(sys.argv[1]), Path(sys.argv[2]))
    print("won")
except FileExistsError:
    print("lost")
"""


@pytest.mark.parametrize("call", ["native", "portable"])
@pytest.mark.parametrize("make", [make_file, make_directory])
def test_of_racing_processes_exactly_one_wins(tmp_path: Path, make: Make, call: str) -> None:
    racers = []
    for name in ("a", "b", "c"):
        make(tmp_path / name, name)
        racers.append(Child(RACER, tmp_path / name, tmp_path / "target", call))
    for racer in racers:
        racer.expect("ready")
    for racer in racers:
        racer.let_go()
    said = [racer.ended()[1].strip() for racer in racers]
    assert sorted(said) == ["lost", "lost", "won"]
    winner = "abc"[said.index("won")]
    assert text_of(tmp_path / "target") == winner
    assert sorted(os.listdir(tmp_path)) == sorted({"a", "b", "c", "target"} - {winner})
