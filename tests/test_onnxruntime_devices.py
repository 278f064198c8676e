"""ONNX Runtime on a device that is not there, or not as it should be: an error, never the CPU unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.runtimes import onnxruntime as runtime
from edgeomni.runtimes.onnxruntime import providers
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory, translated

WITHOUT_GPU = "CUDAExecutionProvider" not in ort.get_available_providers()


def test_the_graph_that_devices_are_tried_with_is_an_identity() -> None:
    port = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", port[:1], port[1:])
    wanted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert onnx.load_from_string(providers.IDENTITY) == wanted
    session = ort.InferenceSession(providers.IDENTITY, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([3.0], np.float32)})[0] == [3.0]


def test_every_device_of_the_engine_has_a_provider_and_a_memory() -> None:
    from edgeomni.engines import ENGINES

    devices = set(ENGINES["onnxruntime"].devices)
    assert devices == set(providers.NAMES) == set(providers.MEMORY)
    assert runtime.problem("cpu") == "" and "unknown device 'tpu'" in runtime.problem("tpu")


@pytest.mark.skipif(not WITHOUT_GPU, reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_build_without_the_provider_says_what_to_install(device: str) -> None:
    said = runtime.problem(device)
    assert (
        f"has no {providers.NAMES[device]}" in said
        and "pip install --force-reinstall --no-deps onnxruntime-gpu" in said
    )
    with pytest.raises(EngineUnavailable, match="onnxruntime-gpu") as caught:
        SessionFactory(device=device)
    assert caught.value.kind == "device"


@pytest.mark.skipif(not WITHOUT_GPU, reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_does_not_start_is_an_error_and_not_the_cpu(
    device: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As onnxruntime-gpu is where there is no GPU: it offers the provider, and then computes on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(providers.NAMES.values()))
    said = runtime.problem(device)
    assert f"{providers.NAMES[device]} of onnxruntime {ort.__version__}" in said and "does not start here" in said
    assert capfd.readouterr().out == "", "standard output may be carrying sound"
    with pytest.raises(EngineUnavailable, match="does not start here"):
        SessionFactory(device=device)


def test_a_session_that_came_out_on_the_cpu_is_refused() -> None:
    session = ort.InferenceSession(providers.IDENTITY, providers=["CPUExecutionProvider"])
    providers.demand("cpu", session)
    for device in ("cuda", "tensorrt"):
        with pytest.raises(EngineUnavailable, match="does not start here"):
            providers.demand(device, session)


def test_the_reason_is_the_machine_where_it_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    for gpu, reason in ((False, "shows no GPU of NVIDIA"), (True, "libcublas.so.13: cannot open")):
        monkeypatch.setattr(providers, "has_nvidia_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr(providers, "_load_libraries", lambda: "Failed to load libcublas.so.13: cannot open")
        with pytest.raises(EngineUnavailable, match=reason.replace("libcublas", ".*libcublas")):
            providers.demand("cuda", session)


@pytest.mark.parametrize(
    "said",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc: Failed to allocate memory for requested buffer of",
        "CUDA failure 2: out of memory ; GPU=0",
        "std::bad_alloc",
    ],
)
def test_too_little_memory_is_named(said: str) -> None:
    wanted = "body.onnx cannot be loaded: too little memory.*--device cpu"
    with pytest.raises(EngineUnavailable, match=wanted) as caught, translated("body.onnx cannot be loaded", "verify"):
        raise RuntimeError(said)
    assert caught.value.kind == "memory"


def test_a_gpu_that_the_build_was_not_made_for_is_named() -> None:
    with (
        pytest.raises(EngineError, match="failed: .*no kernel image is available.*; verify"),
        translated("x failed", "verify"),
    ):
        raise RuntimeError("CUDA failure 209: no kernel image is available for execution on the device")


def test_a_missing_onnxruntime_is_a_problem_and_an_unavailable_engine(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edgeomni.engines import ENGINES\n"
        "from edgeomni.errors import EngineUnavailable\n"
        "from edgeomni.runtimes import problem\n"
        "print(problem(ENGINES['onnxruntime'], 'cpu'))\n"
        "try:\n"
        "    import edgeomni.runtimes.onnxruntime.sessions\n"
        "except EngineUnavailable as exc:\n"
        "    print(exc.kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    problem, kind = done.stdout.splitlines()
    assert "onnxruntime is not installed" in problem and "pip install" in problem and kind == "package"
