"""What tests/test_optimum*.py share: directories that optimum made (tests/optimum_directories.py), unpacked."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import parts
import pytest

from edgeomni.model import checkpoints

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
