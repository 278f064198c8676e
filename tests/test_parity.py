"""Greedy answers of every engine against the published code's, to the last token (tests/golden)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Golden
from engines_here import OPENVINO

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.engines import COMPONENTS
from edgeomni.export import export_bundle
from edgeomni.sampling import Sampling
from edgeomni.spec import AUDIO_OUT
from edgeomni.tokens import frames_to_codes, undelay

TASKS = {"aa": "AA", "at": "AT", "asr": "ASR", "ta": "TA", "tt": "TT", "two-row aa": "BATCH", "stream": "STREAM"}


@pytest.fixture(scope="module", params=["torch", "ort", "portable", "tensorrt", *OPENVINO])
def session(request: pytest.FixtureRequest, golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Session:
    if request.param == "torch":
        return Session.open(golden.path)
    out = tmp_path_factory.mktemp("parity") / request.param
    if request.param in ("tensorrt", "openvino"):  # TensorRT's graphs, on ONNX Runtime
        formats = {str(name): request.param for name in COMPONENTS}
        return Session.open(export_bundle(golden.path, out, precision="fp32", formats=formats))
    return Session.open(export_bundle(golden.path, out, precision="fp32", options={"onnx": {"flavour": request.param}}))


def events_of(session: Session, golden: Golden, task: Any, **kwargs: Any) -> list[Any]:
    question = {"audio": golden.path / "question.wav"} if task[0] == "a" else {"text": golden.meta["text"]}
    limit = golden.meta["max_returned_tokens"]
    return list(session.respond(task, sampling=Sampling(greedy=True), max_length=limit, **question, **kwargs))


@pytest.mark.parametrize("name", TASKS)
def test_greedy_streams_are_exact(name: str, session: Session, golden: Golden) -> None:
    two_row = TASKS[name] in ("BATCH", "STREAM")
    task = "aa" if two_row else name
    end = events_of(session, golden, task, two_row=two_row)[-1]
    assert isinstance(end, TurnEnd)
    expected = golden[f"{TASKS[name]}_tokens"]
    np.testing.assert_array_equal(end.tokens if task in AUDIO_OUT else end.tokens[-1], expected)


def test_the_streamed_wave_is_the_offline_decode(session: Session, golden: Golden, golden_model: Any) -> None:
    """Random codecs may amplify rounding without bound (activations of thousands go into sin), so the yardstick is
    how far the published float32 decode itself lies from the same decode in float64."""
    events = events_of(session, golden, "aa", two_row=False)
    wave = np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)])
    codes = frames_to_codes(undelay(golden["AA_tokens"][:-1]), session.spec.codec)
    golden_model.codec.double()
    try:
        exact = golden_model.decode_codes([torch.from_numpy(c)[None] for c in codes]).detach().numpy()
    finally:
        golden_model.codec.float()
    rounding = np.abs(golden["AA_wave"] - exact).max()
    error = np.abs(wave - exact).max()
    assert error <= 1e-4 + 5 * rounding
