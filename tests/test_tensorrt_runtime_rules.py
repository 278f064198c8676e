"""What TensorRT's adapters owe CUDA: the thread's device, an ended capture, no use of memory that was given back."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_recorder import Recorder, cudaError_t
from engines_here import matches, random_ids, truth
from tensorrt_parts import machine, write_bundle

from edgeomni.bundle import Bundle
from edgeomni.engines import COMPONENTS
from edgeomni.errors import EngineError
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.tensorrt import engine as engines
from edgeomni.runtimes.tensorrt.device import Device


@pytest.fixture(scope="module")
def tiny(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "tiny")


def in_a_new_thread(call: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


# --- threads and devices


def test_another_library_s_device_is_left_current(tiny: Bundle, cuda: Recorder, tiny_model: OmniModel) -> None:
    """It may have made another one current in this thread; the recorder refuses to work there."""
    cuda.devices, cuda.current = 3, 2
    mel = np.zeros((tiny_model.spec.front_end.n_mels, 4), np.float32)
    with machine(cuda) as recorded:
        parts = {name: recorded.open(tiny, name) for name in COMPONENTS}
        assert cuda.current == 2
        parts["encoder"].encode(mel)
        state = parts["llm"].start(2, 4)
        hidden = parts["llm"].forward(random_ids(tiny_model, 2), (), state)
        parts["llm"].text_logits(hidden, 0)
        parts["llm"].fork(state)
        assert cuda.current == 2
        for part in parts.values():
            part.close()
            assert cuda.current == 2


def test_a_component_is_opened_used_and_closed_in_threads_of_its_own(
    tiny: Bundle, cuda: Recorder, tiny_model: OmniModel
) -> None:
    """In each of them the device has to be made current before TensorRT is called."""
    ids = random_ids(tiny_model, 3)
    with machine(cuda) as recorded:
        llm = in_a_new_thread(lambda: recorded.open(tiny, "llm"))
        state = in_a_new_thread(lambda: llm.start(1, 3))
        hidden = in_a_new_thread(lambda: llm.forward(ids, (), state))
        in_a_new_thread(lambda: matches(llm, hidden, 0, truth(tiny_model, ids)))
        in_a_new_thread(llm.close)


def test_the_lock_is_free_again_after_a_call_that_fails(device: Device, cuda: Recorder) -> None:
    cuda.devices, cuda.current = 2, 1
    with pytest.raises(ZeroDivisionError), device.lock, device.lock:
        assert cuda.current == 0
        raise ZeroDivisionError
    assert cuda.current == 1

    def from_another_thread() -> int:
        with device.lock:
            return cuda.current

    assert in_a_new_thread(from_another_thread) == 0
    cuda.current = 0


def test_a_gpu_that_fails_can_still_be_closed(tiny: Bundle, cuda: Recorder, tiny_model: OmniModel) -> None:
    """After an illegal access every call fails, also those that give things back."""
    with machine(cuda) as recorded:
        llm = recorded.open(tiny, "llm")
        for call in ("cudaGetDevice", "cudaSetDevice", "cudaStreamSynchronize", "cudaGraphLaunch"):
            cuda.failing[call] = cudaError_t.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
            llm.forward(random_ids(tiny_model, 1), (), llm.start(1, 4))
        cuda.failing.clear()
        llm.close()


def test_what_cannot_be_given_back_is_told_and_the_rest_is(
    tiny: Bundle, cuda: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with machine(cuda) as recorded:
        encoder = recorded.open(tiny, "encoder")
        cuda.failing["cudaFreeHost"] = cudaError_t.cudaErrorIllegalAddress
        encoder.close()
    assert "GPU memory could not be given back: CUDA failed: cudaFreeHost" in caplog.text


# --- captures


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError("not now")], ids=["interrupt", "error"])
def test_a_capture_that_is_broken_off_ends(tiny: Bundle, cuda: Recorder, error: Any) -> None:
    def broken() -> None:
        raise error

    with machine(cuda) as recorded:
        recorded.tensorrt.while_captured = broken
        if isinstance(error, EngineError):
            recorded.open(tiny, "llm").close()
            return
        with pytest.raises(KeyboardInterrupt):
            recorded.open(tiny, "llm")


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_graph_that_cannot_be_made_is_said_once_and_done_without(
    tiny: Bundle, cuda: Recorder, tiny_model: OmniModel, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    caplog.set_level(logging.WARNING, "edgeomni")
    cuda.failing[call] = cudaError_t.cudaErrorStreamCaptureInvalidated
    ids = random_ids(tiny_model, 4)
    with machine(cuda) as recorded:
        llm = recorded.open(tiny, "llm")
        state = llm.start(1, 4)
        for at in range(4):
            hidden = llm.forward(np.ascontiguousarray(ids[:, :, [at]]), (), state)
            matches(llm, hidden, 0, truth(tiny_model, ids), at)
        llm.close()
    said = [r.getMessage() for r in caplog.records if "CUDA graphs are not used" in r.getMessage()]
    assert len(said) == 4 and call in said[0], "frames of one row and of two, and each of the heads"


# --- memory that was given back


def test_a_hidden_whose_state_s_memory_is_gone_says_so(tiny: Bundle, cuda: Recorder, tiny_model: OmniModel) -> None:
    with machine(cuda) as recorded:
        llm = recorded.open(tiny, "llm")
        states = [llm.start(1, 4) for _ in range(8)]
        hidden = [llm.forward(random_ids(tiny_model, 1, seed), (), s) for seed, s in enumerate(states)]
        del states
        llm.start(1, 4)  # keeps no more caches than it may
        gone = 0
        for each in hidden:
            try:
                llm.text_logits(each, 0)
            except EngineError as exc:
                assert "the state of this hidden is gone" in str(exc)
                gone += 1
        assert gone == 4
        llm.close()


def test_a_turn_that_finds_too_little_memory_leaves_none_behind(
    tiny: Bundle, cuda: Recorder, tiny_model: OmniModel
) -> None:
    """Its caches fit, but not all that its first frames need besides; with more memory they are computed after all."""
    ids = random_ids(tiny_model, 1)
    with machine(cuda) as recorded:
        llm = recorded.open(tiny, "llm")
        first, second = llm.start(1, 4), llm.start(1, 4)
        total, cuda.total = cuda.total, cuda.used() + 1000
        used, pinned = cuda.used(), cuda.leaks()
        for _ in range(2):
            with pytest.raises(EngineError, match="GPU memory cannot be had"):
                llm.forward(ids, (), second)
            assert cuda.used() == used and cuda.leaks() == pinned
        matches(llm, llm.forward(ids, (), first), 0, truth(tiny_model, ids))
        cuda.total = total
        matches(llm, llm.forward(ids, (), second), 0, truth(tiny_model, ids))
        llm.close()


# --- engines that cannot be fed


def test_an_engine_that_reads_a_tensor_on_the_host_is_refused(tiny: Bundle, cuda: Recorder) -> None:
    """Its address would have to be the host's, and a captured graph would go on with the first value."""
    with machine(cuda) as recorded:
        recorded.tensorrt.on_host.add("write_indices")
        with pytest.raises(EngineError, match="llm/body: write_indices would be read by the host"):
            recorded.open(tiny, "llm")


@pytest.mark.parametrize("name", ["inputs_embeds", "logits"])
def test_a_type_that_numpy_does_not_know_is_not_taken_for_another(
    tiny: Bundle, cuda: Recorder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = engines.Engine._read_tensors

    def as_bf16(self: Any, library: Any) -> Any:
        return [replace(t, dtype=None, itemsize=2) if t.name == name else t for t in real(self, library)]

    monkeypatch.setattr(engines.Engine, "_read_tensors", as_bf16)
    with machine(cuda) as recorded, pytest.raises(EngineError, match=f"{name} has a type that numpy does not know"):
        recorded.open(tiny, "llm")


@pytest.mark.parametrize("when", ["state", "next"])
def test_a_codec_s_engine_with_other_states_is_refused(
    tiny: Bundle, cuda: Recorder, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """They lie side by side in one piece of memory: a larger one would reach into its neighbour."""
    name = f"{when}.{tiny.manifest.components['codec'].meta['states'][-1]['name']}"
    real = engines.Engine._read_tensors

    def longer(self: Any, library: Any) -> Any:
        return [
            replace(t, shape=(*t.shape[:-1], t.shape[-1] + 1)) if t.name == name else t for t in real(self, library)
        ]

    monkeypatch.setattr(engines.Engine, "_read_tensors", longer)
    with machine(cuda) as recorded, pytest.raises(EngineError, match=f"codec/codec: {name} is .*this model needs"):
        recorded.open(tiny, "codec")
