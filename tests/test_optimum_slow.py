"""Directories that optimum-cli makes now, in other environments, whose transformers are older.

Skipped unless told where those environments are (docs/optimum.md says how they are made):

    export EDGEOMNI_OPTIMUM_ONNX=/tmp/optimum-onnx EDGEOMNI_OPTIMUM_OPENVINO=/tmp/optimum-intel
    pytest -m slow tests/test_optimum_slow.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import parts
import pytest
from optimum_shelf import composed, misses

from edgeomni.errors import CheckpointError
from edgeomni.export import export_bundle
from edgeomni.model import parts as sources

SCRIPT = Path(__file__).with_name("optimum_directories.py")
pytestmark = pytest.mark.slow


def made(out: Path, kind: str, *options: str) -> Path:
    """The directories that the environment of that kind makes. Skips where none is named."""
    name = f"EDGEOMNI_OPTIMUM_{kind.upper()}"
    if name not in os.environ:
        pytest.skip(f"{name} names no environment with optimum's exporter")
    command = [str(Path(os.environ[name]) / "bin" / "python"), str(SCRIPT), kind, str(out), *options]
    subprocess.run(command, check=True, timeout=1800)
    parts.snac(out / "snac")
    return out


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_what_optimum_makes_today(tmp_path: Path, kind: str) -> None:
    shelf = made(tmp_path / "made", kind)
    for encoder, llm in (("whisper", "qwen2"), ("whisper-equal", "qwen2-equal"), ("whisper", "llama")):
        model = composed(shelf, encoder, llm)
        assert max(misses(model, shelf, encoder, llm)) < 1e-4
        export_bundle(model, tmp_path / "bundle", precision="fp32", threads=1, force=True)  # GateError where it misses


def test_weights_that_optimum_quantized_are_refused(tmp_path: Path) -> None:
    source = str(made(tmp_path / "made", "openvino", "--weight-format", "int8", "--models", "qwen2") / "qwen2")
    with pytest.raises(CheckpointError, match="quantized"):
        sources.read_llm(source, sources.check_llm(source))
