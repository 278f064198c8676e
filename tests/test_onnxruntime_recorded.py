"""Frames of the LLM through the buffers that a CUDA graph would be recorded on, here in the CPU's memory.

Nothing is recorded on a CPU: what is tested is that the frames go in and come out right, that both ways are compared,
and that a replay which gives other numbers is noticed. The recording itself is untested on a GPU.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines_here import random_features, random_ids

from edgeomni.components import Features
from edgeomni.exporters import exporter_of, options_of
from edgeomni.runtimes.onnxruntime import captured, providers
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory


class CpuFactory(SessionFactory):
    """Sessions of the CPU, which are told whether they would record."""

    def __init__(self) -> None:
        super().__init__(1)
        self.recording: list[str] = []

    def open(self, path: Path, *, dynamic: bool = False, records: bool = False) -> Any:
        if records:
            self.recording.append(path.stem)
        return super().open(path, dynamic=dynamic)


@pytest.fixture(scope="module")
def exported(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("recorded")
    options = options_of("onnx", {"flavour": "portable"})
    return out, exporter_of("onnx").export(tiny_model, "llm", out, "fp32", options)


def opened(exported: tuple[Path, Any], model: Any, monkeypatch: pytest.MonkeyPatch, records: bool) -> OrtLanguageModel:
    monkeypatch.setattr(captured, "wanted", lambda device, attention: records)
    factory = CpuFactory()
    llm = OrtLanguageModel(exported[0], exported[1], model.spec, factory)
    assert factory.recording == (["body"] if records else [])
    return llm


def logits(llm: OrtLanguageModel, model: Any, frames: int) -> list[np.ndarray]:
    """Text logits of a prompt and of single frames of one row, two rows, and one again."""
    state = llm.start(2, 120)
    features = random_features(model, 3)
    hidden = llm.forward(random_ids(model, 9), [Features(2, features)], state)
    found = [llm.text_logits(hidden, 0)]
    for i in range(frames):
        if i == 3:
            llm.fork(state)
        if i == frames - 3:
            llm.drop(state, 1)
        hidden = llm.forward(random_ids(model, 1, seed=i, rows=state.rows), [], state)
        found += [llm.text_logits(hidden, row) for row in range(state.rows)]
        found.append(llm.audio_logits(hidden, 0))
    return found


def test_frames_through_fixed_buffers_are_the_same_frames(
    exported: tuple[Path, Any], tiny_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frames = 2 * captured.CHECKED + 5
    plain = logits(opened(exported, tiny_model, monkeypatch, False), tiny_model, frames)
    through = opened(exported, tiny_model, monkeypatch, True)
    for _ in range(2):  # the second turn reuses the buffers of the first, whose frames are no longer checked
        for a, b in zip(plain, logits(through, tiny_model, frames), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert not caplog.records


def test_a_replay_that_gives_other_numbers_is_noticed_and_given_up(
    exported: tuple[Path, Any], tiny_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a recording that reads a position once would: from the third run on its inputs stay what they were."""
    plain = logits(opened(exported, tiny_model, monkeypatch, False), tiny_model, 12)
    ran: dict[int, int] = {}

    class Stuck(captured.Recorded):
        def run(self, inputs: Any, options: Any, compute: Any) -> Any:
            ran[id(self)] = ran.get(id(self), 0) + 1
            stuck = {**inputs, "position_ids": np.zeros_like(inputs["position_ids"])} if ran[id(self)] > 2 else inputs
            return super().run(stuck, options, compute)

    monkeypatch.setattr("edgeomni.runtimes.onnxruntime.kv_cache.Recorded", Stuck)
    caplog.set_level(logging.WARNING, "edgeomni")
    found = logits(opened(exported, tiny_model, monkeypatch, True), tiny_model, 12)
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert any("a replayed CUDA graph gave other numbers" in r.getMessage() for r in caplog.records)


def test_what_is_recorded_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, device, attention, expected in (
        ("1", "cuda", "scatter", True),
        ("1", "cuda", "gqa", False),
        ("1", "cpu", "scatter", False),
        ("1", "tensorrt", "scatter", False),
        ("0", "cuda", "scatter", False),
    ):
        monkeypatch.setenv(captured.VARIABLE, value)
        assert captured.wanted(device, attention) is expected
    monkeypatch.delenv(captured.VARIABLE)
    assert not captured.wanted("cuda", "scatter")
    cuda = ("CUDAExecutionProvider", {"device_id": "0"})
    (name, options), cpu = providers.recording([cuda, "CPUExecutionProvider"])
    assert (name, options["enable_cuda_graph"], cpu) == ("CUDAExecutionProvider", "1", "CPUExecutionProvider")
    assert captured.not_recorded(None).get_run_config_entry(captured.GRAPH_ID) == "-1"
