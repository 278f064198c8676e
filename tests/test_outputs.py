"""Outputs appear whole or not at all and replace nothing by accident: files, links, pipes, devices, names."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from children import Child

from edgeomni import outputs
from edgeomni.errors import UsageError


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_whole(tmp_path: Path, way: str) -> None:
    with outputs.new_file(tmp_path / "a") as part:
        part.write_text("new")
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


def test_a_file_is_replaced_with_force_only(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a"
    path.write_text("older")
    with pytest.raises(UsageError, match="a exists; give another name, or --force"):
        outputs.write_file(path, b"new")
    with pytest.raises(RuntimeError), outputs.new_file(path, force=True) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["a"]
    outputs.write_file(path, b"new", force=True)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_a_file_that_appears_meanwhile_stays_without_force(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a"
    with pytest.raises(UsageError, match="appeared meanwhile"), outputs.new_file(path):
        path.write_text("mine")
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["a"]
    path.unlink()
    with outputs.new_file(path, force=True) as part:
        part.write_text("new")
        path.write_text("mine")
    assert path.read_text() == "new"


def test_a_directory_or_a_pipe_that_appears_meanwhile_stays_even_with_force(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"), outputs.new_file(tmp_path / "a", force=True):
        (tmp_path / "a").mkdir()
    assert (tmp_path / "a").is_dir() and os.listdir(tmp_path) == ["a"]
    with pytest.raises(UsageError, match="has become a pipe"), outputs.new_file(tmp_path / "b", force=True):
        os.mkfifo(tmp_path / "b")
    assert (tmp_path / "b").is_fifo()


def test_a_link_to_a_file_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("older")
    for name, leads_to in (("link", "real"), ("dangling", "later")):
        link = tmp_path / name
        link.symlink_to(leads_to)
        with pytest.raises(UsageError, match="exists"):
            outputs.write_file(link, b"new")
        outputs.write_file(link, b"new", force=True)
        assert link.is_symlink() and (tmp_path / leads_to).read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "later", "link", "real"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'' cannot be the name"),
        ("a\0b", "cannot be the name"),
        ("folder", "is a directory; give a file name"),
        ("none/a", "none: no such directory; make it first"),
        ("dangling", "no such directory"),
    ],
)
def test_names_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("dangling").symlink_to("none/a")
    for write in (outputs.check_file, lambda n, force: outputs.write_file(n, b"", force)):
        with pytest.raises(UsageError, match=said):
            write(name, force=True)
    if not name or "\0" in name:
        with pytest.raises(UsageError, match=said):
            outputs.check_directory(name)


@pytest.mark.parametrize("make", [outputs.new_directory, outputs.new_file])
def test_a_name_that_is_too_long_is_told_before_the_work(tmp_path: Path, make: Any) -> None:
    with pytest.raises(OSError, match="File name too long"), make(tmp_path / ("a" * 256)):
        raise AssertionError("the work does not even begin")
    with make(tmp_path / ("a" * 255)):
        pass
    assert os.listdir(tmp_path) == ["a" * 255]


def test_the_umask_holds(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        with umask(mask):
            with outputs.new_directory(tmp_path / str(mask)) as stage:
                (stage / "weights").touch()
            outputs.write_file(tmp_path / str(mask) / "file", b"")
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / str(mask)).iterdir()}
        assert modes == {"file": 0o666 & ~mask, "weights": 0o666 & ~mask}
        assert stat.S_IMODE((tmp_path / str(mask)).stat().st_mode) == 0o777 & ~mask


# --- pipes and devices ----------------------------------------------------------------------------------------------


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    outputs.write_file(pipe, b"answer")
    reader.join()
    assert got == [b"answer"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.fixture
def null(tmp_path: Path) -> Path:
    """A device like /dev/null, in a folder where it could be replaced if this may be made here, else the real one."""
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.open("wb").close()
    except PermissionError:
        return Path(os.devnull)
    return path


@pytest.mark.parametrize("force", [False, True])
def test_a_device_stays_a_device(null: Path, force: bool) -> None:
    outputs.write_file(null, b"answer", force)
    assert null.is_char_device()
    assert outputs.is_stream(null) and outputs.is_special(null)
    link = null.parent / "link" if null.parent != Path("/dev") else null
    if link != null:
        link.symlink_to(null)
        outputs.write_file(link, b"answer", force)
        assert link.is_symlink() and null.is_char_device()


def test_what_else_is_no_regular_file_needs_force_and_is_not_replaced(tmp_path: Path) -> None:
    """A socket stands in for a disk: both could be harmed by writing to them."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(UsageError, match="exists"):
            outputs.write_file(path, b"answer")
        with pytest.raises(OSError, match="No such device"):
            outputs.write_file(path, b"answer", force=True)
    assert path.is_socket() and os.listdir(tmp_path) == ["socket"]


# --- helpers --------------------------------------------------------------------------------------------------------


def test_strangers_are_what_is_not_known(tmp_path: Path) -> None:
    for name in ("a.txt", "llm/body.onnx", "llm/notes.txt", "photos/me.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("llm")
    (tmp_path / "codec").mkdir()
    known = {"a.txt", "llm/body.onnx", "codec/codec.onnx"}
    assert outputs.strangers(tmp_path, known) == ["link", "llm/notes.txt", "photos"]
    assert outputs.strangers(tmp_path, known | {"link", "llm/notes.txt", "photos/me.jpg"}) == []
    assert outputs.strangers(tmp_path, {"a.txt"}) == ["codec", "link", "llm", "photos"]


def test_the_first_few_names() -> None:
    assert outputs.first_few(["a"]) == "a"
    assert outputs.first_few(["a", "b", "c"]) == "a, b, c"
    assert outputs.first_few(["a", "b", "c", "d"]) == "a, b, c and 1 more"


def test_two_spellings_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").touch()
    os.link("a", "hard")
    Path("soft").symlink_to("a")
    Path("dangling").symlink_to("later")
    for other in ("a", "./a", str(tmp_path / "a"), "hard", "soft"):
        assert outputs.same_file("a", other)
    assert outputs.same_file("later", "dangling") and outputs.same_file("later", "../" + tmp_path.name + "/later")
    assert not outputs.same_file("a", "later") and not outputs.same_file("later", "latest")
    Path("b").touch()
    assert not outputs.same_file("a", "b")


# --- two processes --------------------------------------------------------------------------------------------------

RACER = """
from edgeomni import outputs
from edgeomni.errors import UsageError
kind, target, name = sys.argv[1:]
try:
    with getattr(outputs, "new_" + kind)(target) as part:
        (part / "weights" if part.is_dir() else part).write_text(name)
        pause("working")
except UsageError as exc:
    sys.exit(f"refused: {exc}")
"""


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_of_two_processes_that_want_one_name_one_gets_it(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    racers = [Child(RACER, kind, target, name) for name in ("a", "b")]
    for racer in racers:
        racer.expect("working")
    assert len(os.listdir(tmp_path)) == 2, "both work, neither has swept the other away"
    for racer in racers:
        racer.let_go()
    ends = [racer.ended() for racer in racers]
    assert sorted(code for code, _, _ in ends) == [0, 1]
    loser = next(i for i, (code, _, _) in enumerate(ends) if code)
    assert "refused" in ends[loser][2] and "appeared meanwhile" in ends[loser][2]
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "weights" if kind == "directory" else target).read_text() == "ba"[loser]
