"""Every kind of body and codec goes through `export` with the gate on, from parts as their own libraries save them."""

from __future__ import annotations

from pathlib import Path

import parts
import pytest

from edgeomni.bundle import Bundle
from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.model import checkpoints

CODECS = {
    "snac": parts.snac,
    "snac with attention": lambda directory: parts.snac(directory, attn_window_size=8),
    "mimi": parts.mimi,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parts.whisper(tmp_path_factory.mktemp("parts") / "whisper"))


def exported(root: Path, encoder: str, llm: str, codec: str, precision: str, flavour: str = "ort") -> Bundle:
    model = checkpoints.compose(
        encoder, str(parts.llm(root / "llm", llm)), str(CODECS[codec](root / "codec")), adapter="linear"
    )
    options = {"onnx": {"flavour": flavour, "block": 32}}
    return export_bundle(model, root / "out", precision=precision, options=options, threads=1, gate=GateOptions())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_every_codec(codec: str, flavour: str, encoder: str, tmp_path: Path) -> None:
    bundle = exported(tmp_path, encoder, "qwen2", codec, "fp16" if flavour == "ort" else "fp32", flavour)
    gate = bundle.manifest.gate
    assert gate["passed"] is True
    own = gate["details"]["codec"]["torch against float64, dB"]
    assert 40 < own < 200, "float64 must really be float64: then float32 is near it, and not equal to it"


@pytest.mark.parametrize(
    ("llm", "precision"),
    [(kind, "int4" if i % 2 else "int8") for i, kind in enumerate(parts.LLMS)],
)
def test_every_body(llm: str, precision: str, encoder: str, tmp_path: Path) -> None:
    assert exported(tmp_path, encoder, llm, "snac", precision).manifest.gate["passed"] is True
