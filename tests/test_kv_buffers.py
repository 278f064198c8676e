"""KV buffers of the ONNX Runtime LLM: what is reused, what is kept, and that nothing of an earlier turn shows.

A state gives its buffers back as soon as nobody holds it, which in CPython is at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines_here import random_features, random_ids

from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.model.omni import OmniModel, fill, skeleton
from edgeomni.model.presets import draw
from edgeomni.model.tensors import shapes_of
from edgeomni.runtimes.onnxruntime.kv_cache import Buffers, Stack
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory

CONTEXT = 200


@pytest.fixture(scope="module")
def model(tiny_model: OmniModel) -> OmniModel:
    """One block and a TTS adapter of one block, small enough to run often."""
    spec = replace(tiny_model.spec, body=replace(tiny_model.spec.body, layers=1), tts_layers=1, context=CONTEXT)
    made = skeleton(spec, tiny_model.codec_config)
    return fill(made, {n: draw(n, shape, 1) for n, shape in shapes_of(made.state_dict()).items()})


@pytest.fixture(scope="module", params=["ort", "portable"])
def loaded(model: OmniModel, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out: Path = tmp_path_factory.mktemp("llm")
    component = exporter_of("onnx").export(model, "llm", out, "fp32", options_of("onnx", {"flavour": request.param}))
    return OrtLanguageModel(out, component, model.spec, SessionFactory(1))


@pytest.fixture
def llm(loaded: OrtLanguageModel) -> OrtLanguageModel:
    """No buffers of another test are left."""
    loaded.close()
    return loaded


def right(model: OmniModel, llm: OrtLanguageModel, hidden: Any, row: int, ids: np.ndarray, given: Any = ()) -> None:
    """The logits of that row are those of `ids` [1, K+1, T] at their last position; audio belongs to row 0 alone."""
    with torch.no_grad():
        text, audio = model(torch.from_numpy(ids).long(), [(f.start, torch.from_numpy(f.values)) for f in given])
    np.testing.assert_allclose(llm.text_logits(hidden, row), text[0, -1], atol=1e-4)
    if row == 0:
        np.testing.assert_allclose(llm.audio_logits(hidden, 0), audio[0, -1], atol=1e-4)


def whole_turn(model: OmniModel, llm: OrtLanguageModel, rows: int, frames: int, seed: int = 0) -> Any:
    """Fills a state to its last frame, in all its rows, checks the last position and returns the state."""
    state, ids = llm.start(rows, frames), random_ids(model, frames, seed, rows)
    ids[:, :, : frames - 1] = ids[:1, :, : frames - 1]
    hidden = llm.forward(np.ascontiguousarray(ids[:1, :, : frames - 1]), (), state)
    if rows == 2:
        llm.fork(state)
    hidden = llm.forward(np.ascontiguousarray(ids[:, :, frames - 1 :]), (), state)
    for row in range(rows):
        right(model, llm, hidden, row, ids[row : row + 1])
    return state


def test_a_longer_turn_after_a_short_one(model: OmniModel, llm: OrtLanguageModel) -> None:
    for frames in (4, 9, 5, 9, 10):
        whole_turn(model, llm, 1, frames, seed=frames)


def test_two_rows_after_one_row(model: OmniModel, llm: OrtLanguageModel) -> None:
    for rows in (1, 2, 1, 2):
        whole_turn(model, llm, rows, 6, seed=rows)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ((1, 8), (1, 8), True),
        ((1, 8), (1, 3), True),
        ((2, 8), (1, 8), True),
        ((1, 8), (1, 9), False),
        ((1, 8), (2, 8), False),
        ((1, 8), (2, 4), False),
        ((2, 8), (2, 9), False),
    ],
)
def test_buffers_that_are_large_enough_are_used_again(
    llm: OrtLanguageModel, before: tuple[int, int], after: tuple[int, int], same: bool
) -> None:
    first = llm.start(*before)
    used = first.caches
    del first
    assert (llm.start(*after).caches is used) is same


def test_a_state_in_use_shares_its_buffers_with_nobody(llm: OrtLanguageModel) -> None:
    first, second = llm.start(1, 8), llm.start(1, 8)
    assert first.caches is not second.caches


def test_the_fitting_one_of_several_spares_is_found_and_the_others_stay(llm: OrtLanguageModel) -> None:
    states = [llm.start(1, 4), llm.start(2, 4), llm.start(1, 8)]
    small, double, long = (s.caches for s in states)
    del states
    kept = [llm.start(1, 8), llm.start(2, 3), llm.start(1, 2)]
    assert [s.caches for s in kept] == [long, double, small]


def test_at_most_four_spares_are_kept(llm: OrtLanguageModel) -> None:
    states = [llm.start(1, 8) for _ in range(6)]
    used = [s.caches for s in states]
    del states
    again = [llm.start(1, 8) for _ in range(6)]
    assert sum(s.caches in used for s in again) == 4


def test_close_gives_the_spares_back(model: OmniModel, llm: OrtLanguageModel) -> None:
    used = llm.start(1, 8).caches
    llm.close()
    assert llm.start(1, 8).caches is not used
    whole_turn(model, llm, 1, 8)


def test_what_an_earlier_turn_left_does_not_show(model: OmniModel, llm: OrtLanguageModel) -> None:
    first = llm.start(2, 12)
    used = first.caches
    del first
    for buffers in used:
        for array in buffers.arrays:
            array[:] = 100
    assert whole_turn(model, llm, 2, 8).caches is used


def test_capacity_is_the_state_s_and_not_its_buffers(model: OmniModel, llm: OrtLanguageModel) -> None:
    del_me = llm.start(2, 12)
    del del_me
    state = llm.start(1, 3)
    llm.forward(random_ids(model, 3), (), state)
    with pytest.raises(EngineError, match="holds 3 frames; 3 \\+ 1 are too many"):
        llm.forward(random_ids(model, 1), (), state)
    with pytest.raises(EngineError, match="cannot be forked"):
        llm.fork(state)


def test_frames_up_to_the_context(model: OmniModel, llm: OrtLanguageModel) -> None:
    for outside in (0, -1, CONTEXT + 1):
        with pytest.raises(EngineError, match=f"max_frames {outside}: this export holds 1 to {CONTEXT}"):
            llm.start(1, outside)
    llm.forward(random_ids(model, 1), (), llm.start(1, 1))
    whole_turn(model, llm, 1, CONTEXT)


def test_a_long_prompt_then_two_rows_then_one(model: OmniModel, llm: OrtLanguageModel) -> None:
    """More than the 128 frames that are appended at once; the TTS adapter sees row 0 only, all along."""
    ids = random_ids(model, 140, 3, rows=2)
    ids[:, :, :135] = ids[:1, :, :135]
    given = [Features(1, random_features(model, 130))]
    state = llm.start(2, 140)
    right(model, llm, llm.forward(ids[:1, :, :135].copy(), given, state), 0, ids[:1, :, :135], given)
    llm.fork(state)
    hidden = llm.forward(ids[:, :, 135:138].copy(), (), state)
    for row in (0, 1):
        right(model, llm, hidden, row, ids[row : row + 1, :, :138], given)
    with pytest.raises(EngineError, match="row 1 has no audio logits"):
        llm.audio_logits(hidden, 1)
    llm.drop(state, 1)
    for at in (138, 139):
        hidden = llm.forward(ids[:1, :, at : at + 1].copy(), (), state)
        right(model, llm, hidden, 0, ids[:1, :, : at + 1], given)


class OnDevice:
    """Stands for an OrtValue in a GPU's memory: what is read is a copy, and only `update_inplace` writes."""

    def __init__(self, array: np.ndarray) -> None:
        self.memory = array.copy()

    def numpy(self) -> np.ndarray:
        return self.memory.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        self.memory[:] = array


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_row_is_copied_as_far_as_it_is_filled(on_gpu: bool, model: OmniModel) -> None:
    """Rows 0 and 2 of four; the first 3 of 5 frames."""
    stack = Stack(None, "gqa", model.spec.body, 2, "cpu")
    buffers = Buffers(stack, 4, 5)
    assert len(buffers.arrays) == 4 and buffers.arrays[0].shape == (4, 2, 5, 32), "keys and values of two layers"
    before = [np.random.default_rng(i).standard_normal((4, 2, 5, 32)).astype(np.float32) for i in range(4)]
    buffers.arrays = [OnDevice(b) if on_gpu else b.copy() for b in before]
    buffers.copy_row(0, 2, 3)
    for array, was in zip(buffers.arrays, before, strict=True):
        now = array.numpy() if isinstance(array, OnDevice) else array
        np.testing.assert_array_equal(now[2, :, :3], was[0, :, :3])
        np.testing.assert_array_equal(now[2, :, 3:], was[2, :, 3:])
        np.testing.assert_array_equal(now[[0, 1, 3]], was[[0, 1, 3]])
