"""What a session on a GPU would be opened with, the libraries it needs, and frames that are compared with a replay.

No GPU is needed: options are data, and what ONNX Runtime prints is played by a function in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgeomni.runtimes.onnxruntime import captured, providers
from edgeomni.runtimes.onnxruntime.captured import CHECKED, TOLERANCE, Recorded

CUDA = ("CUDAExecutionProvider", {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC"})


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose devices all work, with a cache of its own."""
    monkeypatch.setattr(providers, "problem", lambda device: "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgeomni" / "onnxruntime-tensorrt"


def test_a_device_s_own_provider_comes_first_and_the_cpu_last(with_gpu: Path) -> None:
    assert providers.usable("cpu") == ["CPUExecutionProvider"]
    assert providers.usable("cuda") == [CUDA, "CPUExecutionProvider"]
    tensorrt, *rest = providers.usable("tensorrt")
    assert rest == [CUDA, "CPUExecutionProvider"]
    options = {"device_id": "0", "trt_engine_cache_enable": "True", "trt_timing_cache_enable": "True"}
    places = {"trt_engine_cache_path": str(with_gpu), "trt_timing_cache_path": str(with_gpu)}
    assert tensorrt == ("TensorrtExecutionProvider", {**options, **places})
    assert with_gpu.is_dir() and providers.usable("tensorrt"), "the folder may be there already"


def test_recording_keeps_the_other_options_and_providers(with_gpu: Path) -> None:
    tensorrt, cuda, cpu = providers.recording(providers.usable("tensorrt"))
    assert cuda == (CUDA[0], {**CUDA[1], "enable_cuda_graph": "1"})
    assert (tensorrt, cpu) == (providers.usable("tensorrt")[0], "CPUExecutionProvider")
    assert "enable_cuda_graph" not in providers.usable("cuda")[0][1], "others go on without"


@pytest.fixture
def unloaded() -> Iterator[None]:
    providers._load_libraries.cache_clear()
    yield
    providers._load_libraries.cache_clear()


def preloading(monkeypatch: pytest.MonkeyPatch, said: str, error: Exception | None = None) -> list[None]:
    calls: list[None] = []

    def preload_dlls() -> None:
        calls.append(None)
        print(said)
        if error is not None:
            raise error

    monkeypatch.setattr(ort, "preload_dlls", preload_dlls, raising=False)
    return calls


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("", ""),
        (
            "Loaded libcublas\nFailed to load libcudnn.so.9: gone\nFailed to load x",
            "Failed to load libcudnn.so.9: gone",
        ),
        ("It Failed to load nothing", ""),
    ],
)
@pytest.mark.parametrize("error", [None, OSError("no such library")], ids=["ends", "raises"])
def test_libraries_are_loaded_once_and_what_is_missing_is_not_printed(
    unloaded: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    said: str,
    missing: str,
    error: Exception | None,
) -> None:
    calls = preloading(monkeypatch, said, error)
    assert [providers._load_libraries() for _ in range(2)] == [missing] * 2
    assert len(calls) == 1 and capfd.readouterr().out == ""


def test_an_onnxruntime_that_cannot_preload_is_taken_as_it_is(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ort, "preload_dlls", raising=False)
    assert providers._load_libraries() == ""


@pytest.mark.parametrize(("device", "and_tensorrt"), [("cuda", False), ("tensorrt", True)])
def test_what_to_install_where_a_provider_does_not_start(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, device: str, and_tensorrt: bool
) -> None:
    monkeypatch.setattr(providers, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    said = providers._does_not_start(device)
    assert "the driver finds no GPU" in said and ("and TensorRT, or use" in said) is and_tensorrt


def test_onnxruntime_s_log_is_as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    monkeypatch.setattr(ort, "set_default_logger_severity", levels.append)
    with pytest.raises(ZeroDivisionError), providers._silent():
        raise ZeroDivisionError
    assert levels == [4, 2]


# --- replayed frames


def recorded(bound: list[Any]) -> Recorded:
    """Frames through a graph of one Identity, on the CPU."""
    session = ort.InferenceSession(providers.IDENTITY, providers=["CPUExecutionProvider"])
    one = np.ones(1, np.float32)
    return Recorded(session, "cpu", {"x": one}, {"y": one}, bound.append)


def test_the_first_frames_are_computed_both_ways_and_later_ones_replayed() -> None:
    bound: list[Any] = []
    frames, computed = recorded(bound), list[None]()

    def compute() -> dict[str, Any]:
        computed.append(None)
        return {"y": value * np.float32(1 + TOLERANCE / 2)}

    for i in range(CHECKED + 3):
        value = np.array([i + 1], np.float32)
        found = frames.run({"x": value}, None, compute)
        assert found["y"] == (value if i >= CHECKED else value * np.float32(1 + TOLERANCE / 2))
    assert len(computed) == CHECKED and len(bound) == 1 and not frames.failed


@pytest.mark.parametrize("factor", [1 + 2 * TOLERANCE, 1 - 2 * TOLERANCE, -1.0, 0.0])
def test_a_difference_beyond_the_tolerance_is_a_failure_told_once(
    factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    frames, value = recorded([]), np.array([5], np.float32)
    found = frames.run({"x": value}, None, lambda: {"y": value * np.float32(factor)})
    assert frames.failed and found["y"] == value * np.float32(factor), "what was computed is the answer"
    assert [captured.VARIABLE in r.getMessage() for r in caplog.records] == [True]


def test_the_tolerance_counts_by_the_largest_number() -> None:
    right = np.array([1000.0, 0.0], np.float32)
    assert captured._alike(right + np.array([0, 0.9], np.float32), right)
    assert not captured._alike(right + np.array([0, 1.1], np.float32), right)
    assert captured._alike(np.zeros(2, np.float32), np.zeros(2, np.float32))
    assert captured._alike(np.zeros(0, np.float32), np.zeros(0, np.float32))
    assert not captured._alike(np.full(2, np.nan, np.float32), right), "not a number is no likeness"


def test_each_recording_has_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []
    for frames in (recorded([]), recorded([])):
        options = ort.RunOptions()
        frames.run({"x": np.ones(1, np.float32)}, options, lambda: {"y": np.ones(1, np.float32)})
        numbers.append(options.get_run_config_entry(captured.GRAPH_ID))
    assert len(set(numbers)) == 2 and "-1" not in numbers and all(n.isdigit() for n in numbers)
    kept = ort.RunOptions()
    kept.log_severity_level = 4
    assert captured.not_recorded(kept) is kept and kept.get_run_config_entry(captured.GRAPH_ID) == "-1"
