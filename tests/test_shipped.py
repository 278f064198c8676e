"""The models that EdgeOmni brings: found by name, and only where nothing else is meant. None of this needs torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

import edgeomni
from edgeomni import Bundle, Sampling, Session, load, shipped
from edgeomni.bundle import is_bundle
from edgeomni.errors import BundleError

NANO = Path(edgeomni.__file__).resolve().parent / "nano"
NOT_SHIPPED = ["Nano", "nano ", "nano/", "./nano", "nano/bundle", "other", ""]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with nothing in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def answer(session: Session) -> str:
    """The likeliest text, of at most 40 frames, to a written question."""
    events = list(session.respond("tt", text="tell me", sampling=Sampling(greedy=True), max_length=40))
    return events[-1].text  # type: ignore[union-attr]


# --- what is found


def test_the_name_is_the_bundle_or_the_checkpoint() -> None:
    assert shipped.found("nano", "bundle") == NANO / "bundle"
    assert shipped.found("nano", "checkpoint") == NANO / "checkpoint"
    assert shipped.found(Path("nano"), "bundle") == NANO / "bundle"


@pytest.mark.parametrize("source", NOT_SHIPPED)
def test_everything_else_passes_unchanged(source: str) -> None:
    assert shipped.found(source, "bundle") is source
    assert shipped.sample_question(source) is None
    path = Path("somewhere") / source.strip()
    assert shipped.found(path, "checkpoint") is path


@pytest.mark.parametrize("kind", ["folder", "file", "link that leads nowhere"])
def test_a_local_path_of_that_name_wins(kind: str) -> None:
    if kind == "folder":
        Path("nano").mkdir()
    elif kind == "file":
        Path("nano").touch()
    else:
        Path("nano").symlink_to("nowhere")
    assert shipped.found("nano", "bundle") == "nano"
    assert shipped.sample_question("nano") is None
    with pytest.raises(BundleError, match=r"^nano: "):
        Bundle.open("nano")


def test_the_local_paths_of_another_folder_can_be_meant(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    assert shipped.found("nano", "checkpoint", tmp_path) == "nano"
    assert shipped.found("nano", "checkpoint") == NANO / "checkpoint"
    Path("nano").mkdir()
    assert shipped.found("nano", "checkpoint", tmp_path / "here" / "..") == "nano"
    assert shipped.found("nano", "checkpoint", NANO) == NANO / "checkpoint"


def test_torch_runs_the_checkpoint_and_everything_else_the_bundle() -> None:
    assert shipped.to_run("nano", "torch") == NANO / "checkpoint"
    assert shipped.to_run("nano", "onnxruntime") == shipped.to_run("nano", None) == NANO / "bundle"
    assert shipped.to_run("ckpt", "torch") == "ckpt"


def test_the_sample_question_is_speech_with_its_words() -> None:
    sample = shipped.sample_question("nano")
    assert sample is not None and sample.path == NANO / "question.wav"
    assert sample.text == (NANO / "question.txt").read_text(encoding="utf-8").rstrip("\n")
    assert len(sample.text.split()) > 1
    samples, rate = soundfile.read(sample.path)
    assert samples.ndim == 1 and 0.5 < len(samples) / rate < 10 and abs(samples).max() > 0.01


# --- what opens it


def test_load_is_session_open_on_the_bundle() -> None:
    with load("nano", threads=1) as session, Session.open(NANO / "bundle", threads=1) as same:
        assert session.spec == same.spec == Bundle.open("nano").spec
        assert answer(session) == answer(same) != ""


def test_load_takes_what_session_open_takes() -> None:
    bundle = Bundle.open("nano")
    with (
        load(bundle, threads=1, engine="onnxruntime") as one,
        Session.open(bundle, threads=1, engine="onnxruntime") as two,
    ):
        assert one.model is two.model, "the weights of one Bundle object are shared"
    with pytest.raises(edgeomni.EdgeOmniError, match="unknown device 'tpu'"):
        load("nano", device="tpu")  # type: ignore[arg-type]
    with pytest.raises(edgeomni.EdgeOmniError, match="threads"):
        load("nano", threads=0)


def test_a_local_bundle_of_that_name_is_what_opens() -> None:
    shutil.copytree(NANO / "bundle", "nano")
    assert is_bundle("nano") and Bundle.open("nano").path == Path("nano")
    (Path("nano") / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"nano: .*tokenizer\.json"):
        load("nano")


def test_opening_and_answering_write_nothing_beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's folder may be read-only, and so may the user's cache."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # a file: nothing can be made in it
    before = {p: p.stat().st_mtime_ns for p in NANO.rglob("*")}
    with load("nano", threads=1) as session:
        answer(session)
    assert {p: p.stat().st_mtime_ns for p in NANO.rglob("*")} == before


# --- a copy without the files


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that lacks the models."""
    folder = tmp_path_factory.mktemp("stripped")
    shutil.copytree(NANO.parent, folder / "edgeomni", ignore=shutil.ignore_patterns("nano", "__pycache__"))
    return folder


@pytest.mark.parametrize(
    ("call", "error", "missing"),
    [
        ("edgeomni.load('nano')", "BundleError", "bundle"),
        ("edgeomni.Bundle.open('nano')", "BundleError", "bundle"),
        ("edgeomni.load('nano', engine='torch')", "CheckpointError", "checkpoint"),
        ("edgeomni.shipped.sample_question('nano')", "AudioError", "question.wav"),
    ],
)
def test_a_copy_without_the_model_says_so(call: str, error: str, missing: str, stripped: Path) -> None:
    done = python(call, stripped)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"edgeomni.errors.{error}: nano is a model that EdgeOmni brings")
    assert str(stripped / "edgeomni" / "nano" / missing) in last and "wheel" in last


def test_a_copy_without_the_model_still_opens_what_is_local(stripped: Path) -> None:
    done = python(f"print(edgeomni.Bundle.open({str(NANO / 'bundle')!r}).size)", stripped)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1e6


def python(call: str, package: Path) -> subprocess.CompletedProcess[str]:
    """Runs the call on the package in that folder."""
    code = f"import edgeomni, edgeomni.shipped\nassert edgeomni.__file__.startswith({str(package)!r})\n{call}"
    env = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
