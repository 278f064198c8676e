"""What tests/test_optimum*.py share: directories that optimum made (tests/optimum_directories.py), unpacked."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch

from edgeomni.model import checkpoints, encoders

ARCHIVES = Path(__file__).parent / "optimum"
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs OpenVINO: the extra [openvino]"
)
FORMATS = ["onnx", pytest.param("openvino", marks=needs_openvino)]


def unpacked(folder: Path, kind: str) -> Path:
    shutil.unpack_archive(ARCHIVES / f"{kind}.zip", folder)
    parts.snac(folder / "snac")
    return folder


def composed(shelf: Path, encoder: str = "whisper", llm: str = "qwen2") -> Any:
    return checkpoints.compose(str(shelf / encoder), str(shelf / llm), str(shelf / "snac"))


def answers(shelf: Path, name: str) -> dict[str, Any]:
    with np.load(shelf / f"{name}.npz") as arrays:
        return dict(arrays)


@torch.inference_mode()
def misses(model: Any, shelf: Path, encoder: str, llm: str) -> list[float]:
    """Largest differences from what transformers answered, of the encoder and of the LLM."""
    heard, said = answers(shelf, encoder), answers(shelf, llm)
    mel = torch.randn(*heard["mel_shape"], generator=torch.Generator().manual_seed(int(heard["mel_seed"])))
    features = encoders.encode(model.encoder, mel)[0, : len(heard["features"])].numpy()
    embeds = model.embedding(torch.from_numpy(said["ids"]))[None]
    logits = model.text_logits(model.hidden(embeds)[0])[0, :, : said["logits"].shape[-1]].numpy()
    return [float(abs(features - heard["features"]).max()), float(abs(logits - said["logits"]).max())]
