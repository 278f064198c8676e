"""Fixtures shared by the tests: golden outputs of the published code, and the tiny random preset."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads of torch would only wait for each other

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would children

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One layout directory with what the published code computed from it (its README tells the names)."""

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def mel(self, frames: int = 3000) -> np.ndarray:
        """The full log-mel [n_mels, 3000]: the stored head, the rest filled with its floor."""
        head = self["mel"]
        full = np.full((head.shape[0], frames), self["mel_fill"], np.float32)
        full[:, : head.shape[1]] = head
        return full

    def features(self) -> np.ndarray:
        """Whisper features before the adapter [T, width]."""
        return self["audio_features"]


def load_golden(path: Path) -> Golden:
    with np.load(path / "golden.npz") as arrays:
        return Golden(path, json.loads((path / "meta.json").read_text()), dict(arrays))


@pytest.fixture(scope="session", params=sorted(p.name for p in GOLDEN.iterdir() if (p / "golden.npz").is_file()))
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(GOLDEN / request.param)


@pytest.fixture(scope="session")
def golden_model(golden: Golden) -> Any:
    """OmniModel of the golden layout."""
    from edgeomni.model import checkpoints

    return checkpoints.load(golden.path)


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """OmniModel of the tiny preset, seed 0; do not change it."""
    from edgeomni.model import checkpoints

    return checkpoints.preset("tiny", 0)


@pytest.fixture(scope="session")
def tiny_dir(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset saved as our own checkpoint directory; do not change it."""
    from edgeomni.model import checkpoints

    return checkpoints.save(tiny_model, tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a directory is replaced, where the system can exchange names and where it cannot."""
    from edgeomni import renames

    if request.param == "two renames":
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    return str(request.param)


@pytest.fixture(scope="session")
def opened(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Components of the tiny preset on every engine that runs here, by the engine's name (engines_here.py)."""
    from engines_here import open_all

    return open_all(tiny_model, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny checkpoint of every kind: mini-omni/, parts/, mimi/ (parts with another codec) and own/."""
    import parts

    from edgeomni.model import checkpoints

    root = tmp_path_factory.mktemp("kinds")
    shutil.copytree(GOLDEN / "tiny_a", root / "mini-omni")
    for kind in ("parts", "mimi"):
        parts.whisper(root / kind / "encoder"), parts.llm(root / kind / "llm")
    parts.snac(root / "parts" / "codec"), parts.mimi(root / "mimi" / "codec")
    checkpoints.save(checkpoints.load(root / "parts"), root / "own")
    return root


@pytest.fixture
def cuda() -> Iterator[Any]:
    """A recorded CUDA (cuda_recorder.py), of which nothing may be left, whatever went wrong."""
    from cuda_recorder import Recorder

    recorder = Recorder()
    yield recorder
    assert recorder.leaks() == []


@pytest.fixture
def device(cuda: Any) -> Iterator[Any]:
    """The device that TensorRT's adapters share, on the recorded CUDA."""
    from tensorrt_parts import machine

    from edgeomni.runtimes.tensorrt.device import acquire, release

    with machine(cuda):
        shared = acquire()
        yield shared
        release(shared)
