"""A bundle on a device: the command line answers from it in a process that cannot import torch or its company.

`make test-pythons` runs this on every Python of the machine, with a device's dependencies and nothing else; there the
bundles were exported beforehand, and DEVICE_BUNDLES names their folder. In the usual run they are exported here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import Golden

EXPORTED_BEFORE = "EDGEOMNI_DEVICE_BUNDLES"
EXPORTED = ("fp32", "int4")
PRECISIONS = EXPORTED if EXPORTED_BEFORE in os.environ else EXPORTED[:1]
"""The usual run exports one alone, since other tests answer from the rest."""
ABSENT = ("onnx", "snac", "torch", "transformers")
"""What a device does not have."""
COMMAND = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from edgeomni.cli import main
main()
"""


@pytest.fixture(scope="module")
def bundles(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle of the golden layout in every precision, as {layout}-{precision}."""
    if EXPORTED_BEFORE in os.environ:
        return Path(os.environ[EXPORTED_BEFORE])
    from edgeomni.export import export_bundle

    folder = tmp_path_factory.mktemp("device")
    for precision in PRECISIONS:
        export_bundle(golden.path, folder / f"{golden.path.name}-{precision}", precision=precision)
    return folder


def edgeomni(*args: object) -> str:
    """Standard output of the command in a process of its own."""
    command = [sys.executable, "-c", COMMAND, *map(str, args)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("task", "name"), [("aa", "BATCH"), ("asr", "ASR")])
def test_an_answer(task: str, name: str, precision: str, golden: Golden, bundles: Path, tmp_path: Path) -> None:
    """fp32 gives the published code's ids on every version of everything; the rounded ones an answer of their own."""
    tokens, wave = tmp_path / "tokens.npz", tmp_path / "answer.wav"
    limit = golden.meta["max_returned_tokens"]
    source, question = bundles / f"{golden.path.name}-{precision}", golden.path / "question.wav"
    sound = ("-o", wave) if task == "aa" else ()
    edgeomni("run", source, question, "--task", task, "--greedy", "--max-length", limit, "--tokens-out", tokens, *sound)
    ids, expected = np.load(tokens)["tokens"], golden[f"{name}_tokens"]
    assert ids.ndim == expected.ndim and ids.shape[-1] > 0
    if precision == "fp32":
        np.testing.assert_array_equal(ids, expected)
    if sound:
        samples, rate = soundfile.read(wave)
        streams = len(ids) - 1  # stream k starts k + 1 frames late, so this many frames complete no codec frame
        per_frame = len(golden["AA_wave"]) / (golden["AA_tokens"].shape[1] - streams)
        assert rate == 24000 and len(samples) == per_frame * max(0, ids.shape[1] - streams)
        assert samples.any() or precision != "fp32", "a random model in int4 may end its answer before any audio"


def test_the_other_commands(golden: Golden, bundles: Path) -> None:
    source = bundles / f"{golden.path.name}-{PRECISIONS[-1]}"
    edgeomni("verify", source)
    assert PRECISIONS[-1] in edgeomni("inspect", source)
    report = json.loads(edgeomni("doctor", "--json"))
    assert report["engines"]["onnxruntime"]["version"] and report["providers"]
