"""Outputs appear whole or not at all and replace nothing by accident: the checks, links, pipes, devices, the umask."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeomni import outputs, renames
from edgeomni.errors import ExportError, UsageError


def no_letters(directory: Path) -> str:
    """An objection: whatever holds a letter is somebody's."""
    return "holds a letter" if (directory / "letter.txt").exists() else ""


def fill(directory: Path, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "weights").write_text(text)
    return directory


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a directory is replaced, where the system can exchange names and where it cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    return str(request.param)


# --- directories ----------------------------------------------------------------------------------------------------


def test_a_directory_appears_when_it_is_whole(tmp_path: Path, way: str) -> None:
    target = tmp_path / "parent" / "out"
    with outputs.new_directory(target) as stage:
        fill(stage, "new")
        assert not target.exists() and stage.parent.parent == target.parent
    assert (target / "weights").read_text() == "new" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [OSError("disk"), KeyboardInterrupt(), SystemExit(143)])
def test_a_directory_that_fails_leaves_nothing_and_keeps_the_older_one(tmp_path: Path, failure: BaseException) -> None:
    older = fill(tmp_path / "out", "older")
    for target in (older, tmp_path / "other"):
        with pytest.raises(type(failure)), outputs.new_directory(target, no_letters) as stage:
            fill(stage, "new")
            raise failure
    assert list(tmp_path.rglob("*")) == [older, older / "weights"] and (older / "weights").read_text() == "older"


def test_what_exists_needs_an_objection_function(tmp_path: Path) -> None:
    fill(tmp_path / "out", "older")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("out", "dangling"):
        with pytest.raises(UsageError, match=f"{name} exists; choose another path, or overwrite it with --force"):
            outputs.check_directory(tmp_path / name)
        with pytest.raises(UsageError, match="exists"), outputs.new_directory(tmp_path / name):
            raise AssertionError("the work does not even begin")


def test_a_directory_is_replaced_whole(tmp_path: Path, way: str) -> None:
    (fill(tmp_path / "out", "older") / "more").write_text("older")
    with outputs.new_directory(tmp_path / "out", no_letters) as stage:
        fill(stage, "new")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/weights"]
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_an_empty_directory_and_a_free_name_are_replaced_without_asking(tmp_path: Path, way: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "free"):
        with outputs.new_directory(tmp_path / name, lambda _: "is never yours") as stage:
            fill(stage, "new")
    assert sorted(os.listdir(tmp_path)) == ["empty", "free"] and (tmp_path / "empty" / "weights").exists()


def test_an_objection_is_heard_before_the_work(tmp_path: Path) -> None:
    (fill(tmp_path / "out", "older") / "letter.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(UsageError, match="out holds a letter, so --force does not overwrite it; remove it yourse"):
            outputs.check_directory(tmp_path / "out", no_letters)
    with pytest.raises(UsageError, match="holds a letter"), outputs.new_directory(tmp_path / "out", no_letters):
        raise AssertionError("the work does not even begin")


@pytest.mark.parametrize("instant", ["during the work", "just before the exchange"])
def test_an_objection_is_heard_at_the_end(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    older = fill(tmp_path / "out", "older")
    exchange = renames.exchange

    def late(new: Path, target: Path) -> bool:
        (older / "letter.txt").write_text("mine")
        return exchange(new, target)

    if instant == "just before the exchange":
        monkeypatch.setattr(outputs, "exchange", late)
    with pytest.raises(UsageError, match="holds a letter"), outputs.new_directory(older, no_letters) as stage:
        fill(stage, "new")
        if instant == "during the work":
            (older / "letter.txt").write_text("mine")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["letter.txt", "out", "weights"]
    assert (older / "weights").read_text() == "older"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_what_appears_meanwhile_stays(tmp_path: Path, way: str, make: Callable[[Path], None]) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(UsageError, match="out appeared meanwhile and was left as it is"),
        outputs.new_directory(target) as stage,
    ):
        fill(stage, "new")
        make(target)
    assert os.listdir(tmp_path) == ["out"] and not (target / "weights").exists()


def test_what_goes_away_meanwhile_leaves_the_name_free(tmp_path: Path, way: str) -> None:
    older = fill(tmp_path / "out", "older")

    def objection(directory: Path) -> str:
        if (directory / "weights").exists() and working:
            (older / "weights").unlink()
            older.rmdir()
        return ""

    working = False
    with outputs.new_directory(older, objection) as stage:
        fill(stage, "new")
        working = True
    assert os.listdir(tmp_path) == ["out"] and (older / "weights").read_text() == "new"


def test_older_contents_that_cannot_go_back_are_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is taken by somebody else just between the two renames."""
    older = fill(tmp_path / "out", "older")
    rename_new = renames.rename_new

    def late(source: Path, target: Path) -> None:
        fill(target, "somebody else's")
        rename_new(source, target)

    monkeypatch.setattr(renames, "_system_call", lambda: None)
    monkeypatch.setattr(outputs, "rename_new", lambda s, t: late(s, t) if not t.exists() else rename_new(s, t))
    refused = pytest.raises(ExportError, match="could not get back its older contents; they are in")
    with refused as caught, outputs.new_directory(older, no_letters) as stage:
        fill(stage, "new")
    kept = Path(str(caught.value).rpartition(" in ")[2])
    assert (kept / "weights").read_text() == "older" and (older / "weights").read_text() == "somebody else's"
    monkeypatch.undo()
    outputs.write_file(tmp_path / "next", b"")
    assert os.listdir(kept.parent) == ["old"]
    assert (kept / "weights").read_text() == "older", "the next output does not sweep it away"


def test_a_link_to_a_directory_stays_and_its_target_is_replaced(tmp_path: Path, way: str) -> None:
    real = fill(tmp_path / "real", "older")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to("../real")
    with outputs.new_directory(link, no_letters) as stage:
        fill(stage, "new")
    assert link.is_symlink() and (real / "weights").read_text() == "new"


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


def test_the_umask_holds(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        with umask(mask):
            with outputs.new_directory(tmp_path / str(mask)) as stage:
                fill(stage, "new")
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
import sys
from edgeomni import outputs
from edgeomni.errors import UsageError
kind, target, name = sys.argv[1:]
try:
    with getattr(outputs, "new_" + kind)(target) as part:
        (part / "weights" if part.is_dir() else part).write_text(name)
        print("working", flush=True)
        sys.stdin.readline()
except UsageError as exc:
    sys.exit(f"refused: {exc}")
"""


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_of_two_processes_that_want_one_name_one_gets_it(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    racers = []
    for name in ("a", "b"):
        command = [sys.executable, "-c", RACER, kind, str(target), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        racers.append(subprocess.Popen(command, text=True, **pipes))  # type: ignore[call-overload]
    for racer in racers:
        assert racer.stdout.readline() == "working\n"
    assert len(os.listdir(tmp_path)) == 2, "both work, neither has swept the other away"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    errors = [racer.communicate()[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 1]
    loser = next(i for i, racer in enumerate(racers) if racer.returncode)
    assert "refused" in errors[loser] and "appeared meanwhile" in errors[loser]
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "weights" if kind == "directory" else target).read_text() == "ba"[loser]
