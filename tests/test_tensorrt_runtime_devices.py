"""TensorRT on the wrong machine, and on one whose memory or GPU gives out: a named error each time, nothing left."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_recorder import Recorder, cudaError_t
from tensorrt_parts import machine, write_bundle

from edgeomni.bundle import Bundle
from edgeomni.components import OpenOptions
from edgeomni.engines import COMPONENTS
from edgeomni.errors import BundleError, EngineError, EngineUnavailable
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import tensorrt as runtime
from edgeomni.runtimes.tensorrt import device


@pytest.fixture(scope="module")
def tiny(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "tiny")


def opened(bundle: Bundle, name: str = "llm") -> Any:
    return runtime.open_component(bundle, name, OpenOptions())


# --- what is missing


def test_without_cuda_python_it_says_what_to_install(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(device, "_shared", None)
    with pytest.raises(EngineUnavailable, match=r"needs cuda-python.*\[tensorrt\]") as caught:
        opened(tiny)
    assert caught.value.kind == "package"


@pytest.mark.parametrize(
    "error", [cudaError_t.cudaErrorInsufficientDriver, cudaError_t.cudaErrorNoDevice, "none"], ids=str
)
def test_without_a_gpu_it_says_so(tiny: Bundle, cuda: Recorder, error: Any) -> None:
    if error == "none":
        cuda.devices = 0
    else:
        cuda.failing["cudaGetDeviceCount"] = error
    with machine(cuda) as recorded:
        for name in COMPONENTS:
            with pytest.raises(EngineUnavailable, match="no NVIDIA GPU can be used") as caught:
                recorded.open(tiny, name)
            assert caught.value.kind == "device"
        assert "no NVIDIA GPU" in runtime.problem("cuda")


def test_without_tensorrt_it_says_which_of_the_two_to_install(tiny: Bundle, cuda: Recorder) -> None:
    with machine(cuda) as recorded:
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            patch.setattr("edgeomni.runtimes.tensorrt.sources.version_of", lambda name: "")
            patch.setattr("edgeomni.runtimes.tensorrt.sources.installed", lambda names: [])
            with pytest.raises(EngineUnavailable, match=r"nothing is installed.*tensorrt") as caught:
                recorded.open(tiny, "llm")
    assert caught.value.kind == "package"


def test_a_tensorrt_that_cannot_be_loaded_is_told(tiny: Bundle, cuda: Recorder) -> None:
    with machine(cuda) as recorded, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(EngineUnavailable, match="cannot be loaded") as caught:
            recorded.open(tiny, "llm")
    assert caught.value.kind == "package"


def test_what_can_be_told_without_a_bundle(cuda: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(cuda):
        assert runtime.problem("cuda") == ""
        monkeypatch.setattr("edgeomni.runtimes.tensorrt.library.installed", lambda names=(): [])
        assert "TensorRT is not installed" in runtime.problem("cuda")


# --- too little memory, and failures under way


@pytest.mark.parametrize("memory", [1 << 10, 1 << 19, 1 << 21, 1 << 22, 6 << 20])
def test_too_little_memory_is_told_and_gives_everything_back(tiny: Bundle, memory: int) -> None:
    """At every point where it can run out: the engine itself, buffers of the heads, caches."""
    cuda = Recorder(memory=memory)
    with machine(cuda) as recorded, pytest.raises(EngineUnavailable, match="GPU memory") as caught:
        recorded.open(tiny, "llm")
    assert caught.value.kind == "memory"
    assert cuda.leaks() == []


def test_an_integrated_gpu_is_asked_for_memory_and_not_about_it(tiny: Bundle) -> None:
    """What a Jetson calls free leaves out what the system would free; the allocation itself tells."""
    cuda = Recorder(memory=1 << 21)
    cuda.integrated = True
    with machine(cuda) as recorded, pytest.raises(EngineUnavailable, match="GPU memory cannot be had") as caught:
        recorded.open(tiny, "llm")
    assert caught.value.kind == "memory" and "cudaMemGetInfo" not in cuda.calls
    assert cuda.leaks() == []


def test_memory_that_cannot_be_pinned(tiny: Bundle, cuda: Recorder) -> None:
    cuda.failing["cudaHostAlloc"] = cudaError_t.cudaErrorMemoryAllocation
    with machine(cuda) as recorded:
        for name in COMPONENTS:
            with pytest.raises(EngineError, match="cannot be pinned: cudaHostAlloc says cudaErrorMemoryAllocation"):
                recorded.open(tiny, name)


def test_a_gpu_that_fails_under_way_fails_the_call(tiny: Bundle, cuda: Recorder, tiny_model: OmniModel) -> None:
    mel = np.zeros((tiny_model.spec.front_end.n_mels, 40), np.float32)
    with machine(cuda) as recorded:
        encoder = recorded.open(tiny, "encoder")
        cuda.failing["cudaStreamSynchronize"] = cudaError_t.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match="the GPU failed: cudaStreamSynchronize says cudaErrorIllegalAddress"):
            encoder.encode(mel)
        cuda.failing.clear()
        encoder.encode(mel)
        encoder.close()


def test_engines_of_another_model_are_refused(tiny: Bundle, cuda: Recorder) -> None:
    """An engine whose tensors are not what the spec says, as a bundle put together by hand may hold."""
    layout = replace(tiny.spec.layout, text_vocab=tiny.spec.layout.text_vocab + 64)
    other = Bundle(tiny.path, replace(tiny.manifest, spec=replace(tiny.spec, layout=layout)))
    with machine(cuda) as recorded, pytest.raises(EngineError, match=r"logits is \[1, 1, 512\], and this model needs"):
        recorded.open(other, "llm")


def test_an_engine_that_is_cut_short_never_reaches_tensorrt(tiny_model: OmniModel, tmp_path: Path) -> None:
    bundle = write_bundle(tiny_model, tmp_path / "cut")
    engine = tmp_path / "cut" / bundle.manifest.components["llm"].meta["engines"][0]["path"]
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"body\.sm_89\.engine has \d+ bytes instead of \d+"):
        Bundle.open(tmp_path / "cut")


def test_an_engine_that_tensorrt_refuses_is_told_with_its_words(tiny: Bundle, cuda: Recorder) -> None:
    """Its facts fit, and yet TensorRT does not take it: what it logs is in the message."""
    with machine(cuda) as recorded:
        recorded.tensorrt.refuses = True
        with pytest.raises(EngineUnavailable, match="does not take this engine.*assertion magicTag") as caught:
            recorded.open(tiny, "llm")
    assert caught.value.kind == "damaged"
