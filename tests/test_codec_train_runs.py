"""Whole runs of codec training at tiny sizes: what they learn, what they write, what stops them."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch
from codec_models import saved_snac, stream
from codec_train_parts import ADVERSARY, CONFIG, RATE, changed, harmonic, logged, sounds
from test_codec_streams import decoder_of

from edgeomni.data.sample import Clip
from edgeomni.errors import TrainError
from edgeomni.model import checkpoints, codecs
from edgeomni.train import codec_files
from edgeomni.train.codec_config import CodecTrainConfig
from edgeomni.train.codec_fit import fit_codec
from edgeomni.train.codec_losses import Spectrum

RESUMED = changed(
    optimizer={"steps": 14},
    quantizer={"start": 3},
    run={"log_every": 4, "save_every": 6, "validate_every": 7},
    adversarial={**vars(ADVERSARY), "from_step": 5},
)
"""Killed at step 11: in the middle of logging, saving and validating, with discriminators."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = sounds(tmp_path_factory.mktemp("sounds") / "data")
    return [Clip.of(folder / f"{i}.wav") for i in range(10)]


@pytest.fixture(scope="module")
def trained(clips: list[Clip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 steps from scratch."""
    run = tmp_path_factory.mktemp("trained") / "run"
    fit_codec(CONFIG, clips, run)
    return run


def tensors(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "codec" / "pytorch_model.bin", weights_only=True)
    return state


def test_twenty_seconds_of_sound_teach_a_codec_that_uses_its_codes(trained: Path) -> None:
    first, *_, last = logged(trained)
    assert last["step"] == 70 and last["log_mel"] < 0.4 * first["log_mel"]
    assert min(last["used"]) > 8 and min(last["perplexity"]) > 4 and min(last["held_out_used"]) > 8
    assert "used" not in first and first["commitment"] == 0 < last["commitment"]
    assert [r["step"] for r in logged(trained) if "held_out" in r] == [35, 70]
    wave = torch.from_numpy(harmonic(1.024, 77))[None]
    with torch.no_grad():
        heard = saved_snac(trained / "codec")(wave[None])[0][0]
    spectrum = Spectrum(256, 24, RATE, 1e-2)
    distance, silence = ((spectrum(w)[1] - spectrum(wave)[1]).abs().mean() for w in (heard, torch.zeros_like(wave)))
    assert distance < 0.5 * silence
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_codec_is_snacs_and_composes(trained: Path, tmp_path: Path) -> None:
    plain = saved_snac(trained / "codec")
    with torch.no_grad():
        codes = plain.encode(torch.from_numpy(harmonic(0.512, 77))[None, None])
    model = checkpoints.compose(
        str(parts.whisper(tmp_path / "whisper")), str(parts.llm(tmp_path / "llm")), str(trained / "codec")
    )
    assert (model.spec.codec.codebook_size, model.spec.codec.sample_rate) == (16, RATE)
    ours = codecs.decode(model.codec, codes)
    with torch.no_grad():
        torch.testing.assert_close(ours, plain.decode(codes)[0, 0])
    arrays = [c[0].numpy() for c in codes]
    (streamed,) = stream(decoder_of(plain, model.spec.codec, "ort", tmp_path), arrays, [len(arrays[0])])
    np.testing.assert_allclose(streamed, ours, atol=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_another(clips: list[Clip], tmp_path: Path) -> None:
    short = changed(optimizer={"steps": 6}, quantizer={"start": 3}, run={"log_every": 2})
    for name, config in {"a": short, "b": short, "c": changed(short, seed=1)}.items():
        fit_codec(config, clips, tmp_path / name)
    assert logged(tmp_path / "a") == logged(tmp_path / "b") != logged(tmp_path / "c")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_codec_train_runs import RESUMED
from edgeomni.data.sample import Clip
from edgeomni.train.codec_fit import fit_codec
def die(step, record):
    if step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
clips = [Clip.of(Path(sys.argv[1]) / f"{i}.wav") for i in range(10)]
fit_codec(RESUMED, clips, sys.argv[2], on_step=die)
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(clips: list[Clip], tmp_path: Path) -> None:
    fit_codec(RESUMED, clips, tmp_path / "whole")
    assert isinstance(clips[0].source, Path)
    arguments = [clips[0].source.parent, tmp_path / "killed", Path(__file__).parent]
    child = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [r["step"] for r in logged(tmp_path / "killed")] == [4, 7, 8]
    assert {p.name for p in (tmp_path / "killed").iterdir()} >= {"state.pt", "codec", "config.toml"}
    fit_codec(RESUMED, clips, tmp_path / "killed", resume=True)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert any("discriminator" in record for record in logged(tmp_path / "whole"))
    one, other = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_decoder_only_moves_nothing_else(trained: Path, clips: list[Clip], tmp_path: Path) -> None:
    sizes, state = codec_files.read_codec(str(trained / "codec"))
    torch.manual_seed(0)
    state = {n: t * (1 + 0.3 * torch.randn_like(t)) if n.startswith("decoder.") else t for n, t in state.items()}
    codec_files.write_codec(codec_files.build(sizes, state), sizes, tmp_path / "worse")
    config = changed(start=str(tmp_path / "worse"), decoder_only=True, run={"validate_every": 10, "log_every": 5})
    fit_codec(changed(config, optimizer={"steps": 25}), clips, tmp_path / "run")
    after = tensors(tmp_path / "run")
    assert {n for n in state if not torch.equal(state[n], after[n])} == {n for n in state if n.startswith("decoder.")}
    first, *_, last = (record for record in logged(tmp_path / "run") if "loss" in record)
    assert last["log_mel"] < 0.9 * first["log_mel"]
    assert len({str(r["held_out_used"]) for r in logged(tmp_path / "run") if "held_out" in r}) == 1


def test_finetuning_begins_with_the_codec_of_a_checkpoint(trained: Path, clips: list[Clip], tmp_path: Path) -> None:
    part = str(parts.whisper(tmp_path / "whisper")), str(parts.llm(tmp_path / "llm"))
    checkpoints.save(checkpoints.compose(*part, str(trained / "codec")), tmp_path / "checkpoint")
    config = CodecTrainConfig(start=str(tmp_path / "checkpoint"))
    config = changed(config, data=vars(CONFIG.data), loss=vars(CONFIG.loss), optimizer={"steps": 2, "lr": 1e-6})
    fit_codec(config, clips, tmp_path / "run")
    before, after = tensors(trained), tensors(tmp_path / "run")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=0.05 if "codebook" in name else 1e-4, rtol=0)
    books = [name for name in before if "codebook" in name]
    assert books and not any(torch.equal(before[name], after[name]) for name in books)


def test_a_mimi_is_refused(tmp_path: Path, clips: list[Clip]) -> None:
    folder = parts.mimi(tmp_path / "mimi")
    with pytest.raises(TrainError, match="its codec is a Mimi, and only SNAC"):
        fit_codec(changed(start=str(folder)), clips, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_collapse_stops_the_run_and_names_the_level(clips: list[Clip], tmp_path: Path) -> None:
    config = changed(
        codec={"codebook_size": 256},
        quantizer={"start": 0, "kmeans_iterations": 0, "kmeans_segments": 1, "revive": 0, "init": "default"},
        collapse={"least_share": 0.9, "patience": 3, "after": 4, "window": 5},
    )
    with pytest.raises(TrainError, match=r"step \d+: level 0 of the codec used \d+ of 256 codes .*collapsed"):
        fit_codec(config, clips, tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(trained: Path, clips: list[Clip], tmp_path: Path) -> None:
    sizes, state = codec_files.read_codec(str(trained / "codec"))
    state["decoder.model.1.bias"] += 3e38
    codec_files.write_codec(codec_files.build(sizes, state), sizes, tmp_path / "huge")
    with pytest.raises(TrainError, match=r"step 1: .*(nan|inf).*diverged.*--resume"):
        fit_codec(changed(start=str(tmp_path / "huge"), decoder_only=True), clips, tmp_path / "run")


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Within the block, no file of this process can grow beyond `most` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_the_last_state_whole(clips: list[Clip], tmp_path: Path) -> None:
    config = changed(optimizer={"steps": 9}, quantizer={"start": 2}, run={"save_every": 4, "log_every": 3})
    limits: list[Any] = []

    def fill(step: int, record: object) -> None:
        if step == 7:
            limits.append(small_files(20_000))
            limits[0].__enter__()

    try:
        with pytest.raises(TrainError, match=r"cannot be written.*state\.pt is whole.*--resume"):
            fit_codec(config, clips, tmp_path / "run", on_step=fill)
    finally:
        limits[0].__exit__(None, None, None)
    saved = codec_files.read_state(tmp_path / "run")
    assert saved and saved["step"] == 4
    fit_codec(config, clips, tmp_path / "run", resume=True)
    fit_codec(config, clips, tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_bfloat16_runs(clips: list[Clip], tmp_path: Path) -> None:
    config = changed(
        optimizer={"steps": 4}, quantizer={"start": 1}, run={"precision": "bf16"}, adversarial=vars(ADVERSARY)
    )
    fit_codec(config, clips, tmp_path / "run")
    assert np.isfinite(logged(tmp_path / "run")[-1]["loss"])
    assert all(t.dtype == torch.float32 for t in tensors(tmp_path / "run").values())
    assert json.loads((tmp_path / "run" / "codec" / "config.json").read_text())["codebook_size"] == 16
