"""GGUF bundles on a GPU answer as on the CPU. To run: build llama-cpp-python with CUDA (docs/gguf.md), then
`python -m pytest -m gpu`. By hand it was run on an H200 (profiles/results): the same answer, 61 dB between the waves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.runtimes.llamacpp import library
from edgeomni.shipped import found

NO_GPU = not library.llama().llama_supports_gpu_offload()


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="llama.cpp was built without a GPU backend")
@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_nano_says_the_same_on_gpu_and_cpu(precision: str, tmp_path: Path) -> None:
    formats, gate = dict.fromkeys(("encoder", "llm", "codec"), "gguf"), GateOptions(enforce=False)
    bundle = export_bundle(found("nano", "checkpoint"), tmp_path / "b", precision=precision, formats=formats, gate=gate)
    ends, waves = [], []
    for device in ("cpu", "cuda"):
        with Session.open(bundle, device=device) as session:
            events = list(session.respond("ta", text="what is the capital of france"))
        waves.append(np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)]))
        ends += [e for e in events if isinstance(e, TurnEnd)]
    np.testing.assert_array_equal(ends[0].tokens, ends[1].tokens)
    assert np.sum((waves[0] - waves[1]) ** 2) < 1e-4 * np.sum(waves[0] ** 2)
