"""Directories appear whole, by an exclusive rename; what is replaced is somebody's own or comes back."""

from __future__ import annotations

import os
from collections.abc import Callable
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


@pytest.mark.parametrize("failure", [OSError("unreadable"), KeyboardInterrupt()])
def test_a_last_look_that_fails_brings_the_older_one_back(tmp_path: Path, way: str, failure: BaseException) -> None:
    older = fill(tmp_path / "out", "older")

    def objection(directory: Path) -> str:
        if directory != older:
            raise failure
        return ""

    with pytest.raises(type(failure)), outputs.new_directory(older, objection) as stage:
        fill(stage, "new")
    assert os.listdir(tmp_path) == ["out"] and (older / "weights").read_text() == "older"


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
