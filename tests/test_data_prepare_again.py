"""Preparing again: after kill -9, with another checkpoint, over what exists; a full disk; the command itself."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from edgeomni.cli import main
from edgeomni.data.readers import DataSet, read_data
from edgeomni.errors import DataError, UsageError
from edgeomni.model import checkpoints
from edgeomni.train.prepare import UNFINISHED, prepare
from edgeomni.train.prepared import MANIFEST, PreparedSamples, read_prepared

COUNT = 40
"""Three shards."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        soundfile.write(tmp_path / f"q{i}.wav", rng.normal(size=2000 + 40 * i) * 0.1, 16000)
        soundfile.write(tmp_path / f"a{i}.wav", rng.normal(size=3000 + 40 * i) * 0.1, 24000)
    lines = [{"audio": f"q{i}.wav", "text": f"t{i}", "answer": "a", "answer_audio": f"a{i}.wav"} for i in range(COUNT)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "t.jsonl"


def same(ours: PreparedSamples, theirs: PreparedSamples) -> bool:
    """Whether two preparations hold the same bytes."""
    assert ours.manifest.shards == theirs.manifest.shards
    pairs = [
        [(folder / name).read_bytes() for folder in (ours.directory, theirs.directory)] for name in ours.manifest.shards
    ]
    return all(a == b for a, b in pairs)


class Stopped(Exception):
    pass


def stop(done: int, total: int) -> None:
    """A progress that ends the work after the first shard."""
    raise Stopped


def begin(data: Path, model: Any, out: Path) -> list[Path]:
    """A preparation that ends after its first shard; the shards that it leaves."""
    with pytest.raises(Stopped):
        prepare(read_data(data), model, out, workers=1, progress=stop)
    assert not out.exists()
    return sorted(out.with_name(out.name + UNFINISHED).glob("*.arrow"))


def test_killed_and_done_again(data: Path, tiny_dir: Path, tiny_model: Any, tmp_path: Path) -> None:
    """kill -9 in the middle ends the worker processes too; the second run keeps what is done, and the result is the
    same as in one go.
    """
    program = tmp_path / "killed.py"
    program.write_text(
        "import os, signal\n"
        "from edgeomni.data.readers import read_data\n"
        "from edgeomni.model import checkpoints\n"
        "from edgeomni.train.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        f"    model = checkpoints.load({str(tiny_dir)!r})\n"
        f"    prepare(read_data({str(data)!r}), model, {str(tmp_path / 'out')!r}, workers=2,\n"
        "            progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, timeout=300)  # until all have closed the pipe
    assert done.returncode == -9, done.stderr
    unfinished = tmp_path / f"out{UNFINISHED}"
    finished = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.arrow")}
    assert finished and not (tmp_path / "out").exists()
    (unfinished / sorted(finished)[0]).touch()  # a shard that is kept keeps this time
    finished = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.arrow")}
    told: list[tuple[int, int]] = []
    prepare(read_data(data), tiny_model, tmp_path / "out", workers=1, progress=lambda *at: told.append(at))
    assert told == [(16, COUNT), (32, COUNT), (COUNT, COUNT)]
    for name, time in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time
    assert not unfinished.exists()
    prepare(read_data(data), tiny_model, tmp_path / "whole", workers=1)
    spec = tiny_model.spec
    assert same(read_prepared(tmp_path / "out", spec), read_prepared(tmp_path / "whole", spec))


def test_what_has_changed_meanwhile_is_done_again(data: Path, tiny_model: Any, tmp_path: Path) -> None:
    (stale,) = begin(data, tiny_model, tmp_path / "out")
    soundfile.write(tmp_path / "q3.wav", np.full(1600, 0.3), 16000)
    manifest = prepare(read_data(data), tiny_model, tmp_path / "out", workers=1)
    assert stale.name not in manifest.shards and not (tmp_path / "out" / stale.name).exists()
    prepare(read_data(data), tiny_model, tmp_path / "whole", workers=1)
    spec = tiny_model.spec
    assert same(read_prepared(tmp_path / "out", spec), read_prepared(tmp_path / "whole", spec))


def test_going_on_with_another_checkpoint(data: Path, tiny_model: Any, tmp_path: Path) -> None:
    begin(data, tiny_model, tmp_path / "out")
    other = checkpoints.preset("tiny", 1)
    with pytest.raises(DataError, match="codec: other weights"):
        prepare(read_data(data), other, tmp_path / "out", workers=1)
    prepare(read_data(data), other, tmp_path / "out", workers=1, force=True)
    prepare(read_data(data), other, tmp_path / "whole", workers=1)
    assert same(read_prepared(tmp_path / "out", other.spec), read_prepared(tmp_path / "whole", other.spec))


def test_what_is_in_the_way_stays(data: Path, tiny_model: Any, tmp_path: Path) -> None:
    few = DataSet(read_data(data).samples[:2], "native", [], "t")
    for name in ("out", f"out{UNFINISHED}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
        for force in (False, True):
            with pytest.raises(UsageError, match=str(tmp_path / name)):
                prepare(few, tiny_model, tmp_path / "out", workers=1, force=force)
        (tmp_path / name / "mine").unlink()
        (tmp_path / name).rmdir()
    prepare(few, tiny_model, tmp_path / "out", workers=1)
    with pytest.raises(UsageError, match="--force"):
        prepare(few, tiny_model, tmp_path / "out", workers=1)
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="mine"):
        prepare(few, tiny_model, tmp_path / "out", workers=1, force=True)
    (tmp_path / "out" / "mine").unlink()
    prepare(DataSet(few.samples[:1], "native", [], "t"), tiny_model, tmp_path / "out", workers=1, force=True)
    assert len(read_prepared(tmp_path / "out", tiny_model.spec)) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more(data: Path, tiny_model: Any, tmp_path: Path) -> None:
    samples = read_data(data)
    with files_of_at_most(20_000), pytest.raises(DataError, match=f"{tmp_path / 'out'}.*could not be written"):
        prepare(samples, tiny_model, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    assert len(prepare(samples, tiny_model, tmp_path / "out", workers=1).shards) == 3


def test_workers_are_counted_from_one(data: Path, tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 workers"):
        prepare(read_data(data), tiny_model, tmp_path / "out", workers=0)


class TestCommand:
    @staticmethod
    def run(*words: object) -> Result:
        return CliRunner().invoke(main, ["data", "prepare", *map(str, words), "--workers", "1"])

    def test_it_prepares(self, data: Path, tiny_dir: Path, tiny_model: Any, tmp_path: Path) -> None:
        data.write_text(data.read_text() + "{no json\n")
        (tmp_path / "q7.wav").unlink()
        result = self.run(data, tiny_dir, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{tmp_path / 'out'}: {COUNT - 1} samples, 2 left out\n"
        assert f"{data}:8: left out" in result.stderr and f"prepare: {COUNT} of {COUNT} samples" in result.stderr
        assert len(read_prepared(tmp_path / "out", tiny_model.spec)) == COUNT - 1

    def test_too_many_bad_samples(self, data: Path, tiny_dir: Path, tmp_path: Path) -> None:
        for i in (3, 30):
            os.truncate(tmp_path / f"a{i}.wav", 1000)
        result = self.run(data, tiny_dir, "-o", tmp_path / "out", "--max-bad", "1")
        assert result.exit_code == 1 and "--max-bad" in result.stderr and f"{data}:4" in result.stderr
        assert self.run(data, tiny_dir, "-o", tmp_path / "out", "--max-bad", "2").exit_code == 0

    def test_an_existing_folder_is_refused_at_once(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / MANIFEST).touch()
        result = self.run(data, tmp_path / "no checkpoint", "-o", tmp_path / "out")
        assert result.exit_code == 2 and "--force" in result.stderr
