"""What goes wrong in a run: one bad sample is a warning; anything worse ends it and says why, and its states stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from training import data_in, figures_in, samples_in, small_config, small_model, tone

from edgeomni.data.sample import Sample
from edgeomni.errors import CheckpointError, DataError, EdgeOmniError, TrainError
from edgeomni.train import fit
from edgeomni.train.states import last_whole_state


def test_a_corrupt_recording_among_good_ones_is_told_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_in(tmp_path / "data", 5)
    corrupt(tmp_path / "data" / "q2.wav")
    trained = fit(small_model(), data, small_config(tasks={"at": 1.0}, data={"max_bad": 1}), tmp_path / "run")
    assert [line["step"] for line in trained.log] == list(range(1, 9))
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 1 and f"{data}:3" in told[0] and "q2.wav" in told[0]
    sizes = {line["frames"] for line in trained.log}
    assert len(sizes) == 8  # every batch was full


def corrupt(path: Path) -> None:
    """The header of a WAV file stays, and of its sound only half: it can be opened, and not be read to its end."""
    flac = path.with_suffix(".flac")
    samples, rate = soundfile.read(path)
    soundfile.write(flac, samples, rate)
    raw = bytearray(flac.read_bytes())
    raw[len(raw) // 2 :] = b"\x55" * (len(raw) - len(raw) // 2)
    path.write_bytes(raw)
    flac.unlink()


def test_more_bad_samples_than_allowed_end_the_run_and_name_the_last(tmp_path: Path) -> None:
    data = data_in(tmp_path / "data", 6)
    for i in (1, 4):
        corrupt(tmp_path / "data" / f"q{i}.wav")
    config = small_config(tasks={"at": 1.0}, data={"max_bad": 1})
    with pytest.raises(DataError, match=r"2 samples cannot be used, more than data.max_bad allows \(1\).*jsonl:[25]"):
        fit(small_model(), data, config, tmp_path / "run")


def test_samples_that_go_bad_during_a_run_leave_its_last_state_usable(tmp_path: Path) -> None:
    """The recordings are good when the run begins, and destroyed before it goes on; then they are put back."""
    data = data_in(tmp_path / "data", 5)
    config = small_config(tasks={"at": 1.0}, data={"max_bad": 0}, optimizer={"steps": 4})
    longer = small_config(tasks={"at": 1.0}, data={"max_bad": 0}, optimizer={"steps": 9})
    fit(small_model(), data, config, tmp_path / "run")
    good = (tmp_path / "data" / "q1.wav").read_bytes()
    corrupt(tmp_path / "data" / "q1.wav")
    with pytest.raises(DataError, match="jsonl:2"):
        fit(small_model(), data, longer, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "states" / "checkpoint-4" / "complete").exists()
    (tmp_path / "data" / "q1.wav").write_bytes(good)
    trained = fit(small_model(), data, longer, tmp_path / "run", resume=True)
    assert trained.log[-1]["step"] == 9


def test_every_recording_bad(tmp_path: Path) -> None:
    data = data_in(tmp_path / "data", 3)
    for i in range(3):
        corrupt(tmp_path / "data" / f"q{i}.wav")
    with pytest.raises(DataError, match="no sample of task at can be used"):
        fit(small_model(), data, small_config(tasks={"at": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_keeps_the_states_and_a_lower_rate_goes_on(tmp_path: Path) -> None:
    samples = samples_in(tmp_path / "data")
    tame = {"lr": 1e-3, "steps": 4}
    fit(small_model(), samples, small_config(optimizer=tame), tmp_path / "run")
    wild = small_config(optimizer={"lr": 1e30, "steps": 8})
    with pytest.raises(TrainError, match=r"(loss became (nan|inf) in step [5-8]|weights became).*lower optimizer.lr"):
        fit(small_model(), samples, wild, tmp_path / "run", resume=True)
    assert last_whole_state(tmp_path / "run" / "states") == tmp_path / "run" / "states" / "checkpoint-4"
    lower = small_config(optimizer={"lr": 5e-4, "steps": 8})
    trained = fit(small_model(), samples, lower, tmp_path / "run", resume=True)
    assert [line["step"] for line in trained.log] == list(range(1, 9))
    assert trained.log[-1]["loss"] < trained.log[0]["loss"]


def test_a_model_that_holds_an_infinity_is_told_in_the_first_step(tmp_path: Path) -> None:
    model = small_model()
    model.body.norm.weight.data[3] = float("inf")
    with pytest.raises(TrainError, match="loss became nan in step 1"):
        fit(model, samples_in(tmp_path / "data"), small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_became_infinite_are_not_saved(tmp_path: Path) -> None:
    """The step that breaks them has a finite loss; its state would be one that nothing can go on from."""
    config = small_config(optimizer={"lr": 1e39, "clip": 0.0}, run={"save_every": 1})
    with pytest.raises(TrainError, match="weights became infinite or not a number"):
        fit(small_model(), samples_in(tmp_path / "data"), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training import samples_in, small_config, small_model
from edgeomni.errors import TrainError
from edgeomni.train import fit
root, states = Path(sys.argv[2]), []
samples = samples_in(root / "data")
config = small_config(optimizer={"steps": 4})
fit(small_model(), samples, config, root / "run")
longer = small_config(optimizer={"steps": 6})
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for out, resume in ((root / "run", True), (root / f"new {limit}", False)):
        try:
            fit(small_model(), samples, longer, out, resume=resume)
        except TrainError as exc:
            print(limit, resume, exc)
        print("left" if out.exists() else "gone", flush=True)
"""


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """The system refuses writes beyond a limit, at different files of a state: its weights, its optimizer, its log."""
    root = tmp_path / "root"
    limits = ["60000", "100"]
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parent), str(root), *limits]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line for line in said if line in ("left", "gone")] == ["left", "gone"] * 2, said
    messages = [line for line in said if line not in ("left", "gone")]
    assert len(messages) == 4, said
    assert all("make room" in line or "cannot be written" in line for line in messages), said
    assert last_whole_state(root / "run" / "states") == root / "run" / "states" / "checkpoint-4"
    samples = samples_in(root / "data")
    trained = fit(small_model(), samples, small_config(optimizer={"steps": 6}), root / "run", resume=True)
    assert trained.log[-1]["step"] == 6 and figures_in(root / "run")[-1]["step"] == 6


def unusable(model: Any, samples: list[Sample], match: str, error: type[EdgeOmniError], **sections: Any) -> None:
    out = Path(str(samples[0].audio[0].source)).parent / "run"
    with pytest.raises(error, match=match):
        fit(model, samples, small_config(**sections), out)
    assert not out.exists()


def test_data_that_fits_no_task_or_not_the_wanted_one(tmp_path: Path) -> None:
    asr = samples_in(tmp_path / "data", answer="", answer_audio=None)
    unusable(small_model(), asr, "no sample serves any task of stage 2", DataError, stage="2")
    unusable(small_model(), asr, "no sample serves task aa; add samples", DataError, tasks={"aa": 1.0, "asr": 1.0})


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = small_model()
    model.tokenizer_json = None
    unusable(model, samples_in(tmp_path / "data"), "tokenizer", CheckpointError)


def test_answers_beyond_the_context(tmp_path: Path) -> None:
    samples = samples_in(tmp_path / "data", answer=" ".join(["one"] * 300))
    unusable(small_model(), samples, r"context of 256", DataError, stage="2", data={"max_bad": 3})


def test_recordings_beyond_the_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = samples_in(tmp_path / "data", 4)
    soundfile.write(tmp_path / "data" / "q1.wav", tone(300, 5.0), 16000)
    trained = fit(small_model(), samples, small_config(tasks={"at": 1.0}, optimizer={"steps": 1}))
    assert trained.folder is None and len(trained.log) == 1
    assert "made:1 is left out" in caplog.text and "encoder hears 2" in caplog.text


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="data.train names no data"):
        fit(small_model(), None, small_config(), tmp_path / "run")
    with pytest.raises(DataError, match="no such file"):
        fit(small_model(), tmp_path / "missing.jsonl", small_config(), tmp_path / "run")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"nothing": 1}) + "\n")
    with pytest.raises(DataError, match="odd.jsonl"):
        fit(small_model(), tmp_path / "odd.jsonl", small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
