"""The recorder of CUDA and TensorRT itself: that it refuses what is forbidden, runs late, and is like the real ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_recorder
from cuda_recorder import ProtocolError, Recorder
from tensorrt_building import engine_bytes
from tensorrt_context import Context
from tensorrt_recorder import TensorRT

from edgeomni.errors import EngineUnavailable
from edgeomni.runtimes.tensorrt import device


@pytest.fixture
def raw() -> Recorder:
    return Recorder()


def test_the_recorder_refuses_what_cuda_forbids(raw: Recorder) -> None:
    _, stream = raw.cudaStreamCreateWithFlags(1)
    _, there = raw.cudaMalloc(64)
    _, here = raw.cudaHostAlloc(64, 0)
    up, down = raw.cudaMemcpyKind.cudaMemcpyHostToDevice, raw.cudaMemcpyKind.cudaMemcpyDeviceToHost
    calls: list[Callable[[], object]] = [
        lambda: raw.cudaMemcpyAsync(there, here, 65, up, stream),
        lambda: raw.cudaMemcpyAsync(here, there, 64, up, stream),
        lambda: raw.cudaMemcpyAsync(there, there, 64, down, stream),
        lambda: raw.cudaMemcpyAsync(there + 32, here, 64, up, stream),
        lambda: raw.cudaMemcpyAsync(12345, here, 4, up, stream),
        lambda: raw.cudaFree(here),
        lambda: raw.cudaFree(there + 1),
        lambda: raw.cudaFreeHost(there),
        lambda: raw.cudaStreamEndCapture(stream),
        lambda: raw.cudaGraphLaunch(stream, stream),
    ]
    for broken in calls:
        with pytest.raises(ProtocolError):
            broken()
    raw.cudaMemcpyAsync(there, here, 64, up, stream)
    with pytest.raises(ProtocolError, match="while the stream has work"):
        raw.cudaFree(there)
    raw.cudaStreamSynchronize(stream)
    raw.cudaStreamBeginCapture(stream, raw.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    captured: list[Callable[[], object]] = [
        lambda: raw.cudaMalloc(1),
        lambda: raw.cudaStreamSynchronize(stream),
        lambda: raw.cudaFree(there),
    ]
    for forbidden in captured:
        with pytest.raises(ProtocolError, match="captured"):
            forbidden()
    raw.cudaMemcpyAsync(there, here, 64, up, stream)
    _, graph = raw.cudaStreamEndCapture(stream)
    _, executable = raw.cudaGraphInstantiate(graph, 0)
    raw.cudaFreeHost(here)
    with pytest.raises(ProtocolError, match="was freed"):
        raw.cudaGraphLaunch(executable, stream)
    assert raw.leaks() == ["1 device", "1 executable graph", "1 graph", "1 stream"]


def test_recorded_work_is_done_when_the_stream_is_waited_for(raw: Recorder) -> None:
    """A result read too early is not there yet, and what a waiting copy reads must stay as it is."""
    _, stream = raw.cudaStreamCreateWithFlags(1)
    (_, a), (_, b), (_, there) = raw.cudaHostAlloc(8, 0), raw.cudaHostAlloc(8, 0), raw.cudaMalloc(8)
    source, target = (raw.span(x, 8, "pinned", "test") for x in (a, b))
    source[:] = 1
    raw.cudaMemcpyAsync(there, a, 8, raw.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)
    raw.cudaMemcpyAsync(b, there, 8, raw.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)
    assert (target == 0xFF).all()
    raw.cudaStreamSynchronize(stream)
    assert (target == 1).all()
    raw.cudaMemcpyAsync(b, there, 8, raw.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)
    assert (target == 0xFF).all(), "nothing that was there before may be relied on"
    raw.cudaStreamSynchronize(stream)
    raw.cudaMemcpyAsync(there, a, 8, raw.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)
    source[:] = 2
    with pytest.raises(ProtocolError, match="written to what a waiting copy reads"):
        raw.cudaStreamSynchronize(stream)


def doubled(folder: Path) -> Path:
    """A graph y = 2 x of [n] and [n]."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "doubled", [x], [y])
    path = folder / "doubled.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    return path


class Logger:
    """Keeps what TensorRT says. Its class is made anew, since the package's ILogger is."""

    def __init__(self, module: Any) -> None:
        self.said: list[str] = []
        self.real = module.ILogger()
        self.real.log = lambda severity, message: self.said.append(message)


def test_engines_that_are_cut_or_foreign_are_refused(raw: Recorder, tmp_path: Path) -> None:
    module = TensorRT(raw).module()
    raw.cudaSetDevice(0)
    logger = Logger(module)
    runtime = module.Runtime(logger.real)
    good = engine_bytes(doubled(tmp_path), [{"x": [[1], [4], [8]]}])
    assert runtime.deserialize_cuda_engine(good) is not None
    foreign = [
        engine_bytes(tmp_path / "doubled.onnx", [], sms=["sm_87"]),
        engine_bytes(tmp_path / "x", [], version="1"),
    ]
    for bad in (good[:-1], b"", b"x" + good, good[:40], *foreign):
        assert runtime.deserialize_cuda_engine(bad) is None
    assert len(logger.said) == 6


def test_an_engine_computes_when_its_stream_is_waited_for_and_not_otherwise(raw: Recorder, tmp_path: Path) -> None:
    module = TensorRT(raw).module()
    profiles = [{"x": [[1], [4], [8]]}]
    data = engine_bytes(doubled(tmp_path), profiles)
    with pytest.raises(ProtocolError, match="whose current device is not set"):
        module.Runtime(module.ILogger()).deserialize_cuda_engine(data)
    raw.cudaSetDevice(0)
    engine = module.Runtime(module.ILogger()).deserialize_cuda_engine(data)
    context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    _, stream = raw.cudaStreamCreateWithFlags(1)
    (_, x), (_, y), (_, scratch) = raw.cudaMalloc(16), raw.cudaMalloc(16), raw.cudaMalloc(4096)
    with pytest.raises(ProtocolError, match="shape of x is not set"):
        context.execute_async_v3(int(stream))
    assert not context.set_input_shape("x", (9,)), "outside the profile"
    assert context.set_input_shape("x", (4,)) and context.set_tensor_address("x", x)
    with pytest.raises(ProtocolError, match="no address for"):
        context.execute_async_v3(int(stream))
    context.set_tensor_address("y", x)
    context.set_device_memory(scratch, 4096)
    with pytest.raises(ProtocolError, match="overlaps the input"):
        context.execute_async_v3(int(stream))
    with pytest.raises(ProtocolError, match="not aligned"):
        context.set_tensor_address("y", y + 4)
    context.set_tensor_address("y", y)
    raw.span(x, 16, "device", "test").view(np.float32)[:] = [1, 2, 3, 4]
    raw.cudaStreamBeginCapture(stream, raw.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    with pytest.raises(ProtocolError, match="before a first run"):
        context.execute_async_v3(int(stream))
    raw.cudaStreamEndCapture(stream)
    assert not context.set_optimization_profile_async(1, int(stream)), "there is but one"
    assert context.set_optimization_profile_async(0, int(stream))
    with pytest.raises(ProtocolError, match="shape of x is not set"):
        context.execute_async_v3(int(stream))
    context.set_input_shape("x", (4,))
    assert context.execute_async_v3(int(stream))
    assert np.isnan(raw.span(y, 16, "device", "test").view(np.float32)).all(), "it has not run yet"
    raw.cudaStreamSynchronize(stream)
    np.testing.assert_array_equal(raw.span(y, 16, "device", "test").view(np.float32), [2, 4, 6, 8])
    context.set_input_shape("x", (8,))
    with pytest.raises(ProtocolError, match="leave an allocation of 16"):
        context.execute_async_v3(int(stream))
    context.set_input_shape("x", (4,))
    raw.cudaStreamBeginCapture(stream, raw.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    changes: list[Callable[[], object]] = [
        lambda: context.set_input_shape("x", (4,)),
        lambda: context.set_tensor_address("x", x),
        lambda: context.set_device_memory(scratch, 4096),
        lambda: context.set_optimization_profile_async(0, int(stream)),
    ]
    for change in changes:
        with pytest.raises(ProtocolError, match="while a stream is captured"):
            change()
    assert context.execute_async_v3(int(stream))
    _, graph = raw.cudaStreamEndCapture(stream)
    for change in changes:
        with pytest.raises(ProtocolError, match="that a captured graph runs"):
            change()
    raw.cudaGraphDestroy(graph)


def test_a_profile_that_is_being_switched_is_waited_for_before_a_capture(raw: Recorder, tmp_path: Path) -> None:
    module = TensorRT(raw).module()
    raw.cudaSetDevice(0)
    data = engine_bytes(doubled(tmp_path), [{"x": [[1], [4], [8]]}] * 2)
    engine = module.Runtime(module.ILogger()).deserialize_cuda_engine(data)
    context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    _, stream = raw.cudaStreamCreateWithFlags(1)
    for name in "xy":
        context.set_tensor_address(name, raw.cudaMalloc(16)[1])
    context.set_device_memory(raw.cudaMalloc(4096)[1], 4096)
    context.set_input_shape("x", (4,))
    context.execute_async_v3(int(stream))
    raw.cudaStreamSynchronize(stream)
    context.set_optimization_profile_async(1, int(stream))
    context.set_input_shape("x", (4,))
    raw.cudaStreamBeginCapture(stream, raw.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    with pytest.raises(ProtocolError, match="captured before a first run"):
        context.execute_async_v3(int(stream))


def test_the_device_that_is_current_in_a_thread_is_the_one_that_works(raw: Recorder) -> None:
    raw.devices = 2
    assert raw.cudaGetDevice() == (0, 0)
    raw.cudaSetDevice(1)
    with pytest.raises(ProtocolError, match="cudaMalloc 8 in a thread whose current device is 1"):
        raw.cudaMalloc(8)
    with pytest.raises(ProtocolError, match="there is no device 2"):
        raw.cudaSetDevice(2)
    raw.cudaSetDevice(0)
    raw.failing["cudaMemGetInfo"] = raw.cudaError_t.cudaErrorIllegalAddress
    raw.cudaMemGetInfo()
    assert raw.leaks()[-1] == "the error cudaErrorIllegalAddress"
    assert raw.cudaGetLastError() == (700,) and raw.cudaGetLastError() == (0,)


# --- is it like the real ones?


def test_cuda_python_has_every_call_with_as_many_arguments(raw: Recorder) -> None:
    """Where cuda-bindings is installed; a GPU is not needed for it."""
    real = pytest.importorskip("cuda.bindings.runtime")
    for name in dir(raw):
        if name.startswith("cuda"):
            assert hasattr(real, name), name
        if name.startswith("cuda") and callable(given := getattr(raw, name)) and not isinstance(given, type):
            line = getattr(real, name).__doc__.splitlines()[0]
            wanted = [part for part in line[line.index("(") + 1 : line.rindex(")")].split(",") if part.strip()]
            assert len(inspect.signature(given).parameters) == len(wanted), line
    for kind in (raw.cudaError_t, raw.cudaMemcpyKind, raw.cudaStreamCaptureMode):
        for member in kind:
            assert int(getattr(getattr(real, kind.__name__), member.name)) == int(member)


def test_tensorrt_has_every_class_and_method(raw: Recorder) -> None:
    """Where tensorrt-rtx is installed. What the recorder offers, and no more, is what the adapters can use."""
    real = pytest.importorskip("tensorrt_rtx")
    module = TensorRT(raw).module()
    engine = tensorrt_recorder._Engine, "ICudaEngine"
    context, config = (Context, "IExecutionContext"), (tensorrt_recorder._Config, "IRuntimeConfig")
    for ours, theirs in (engine, context, config, (module.Runtime, "Runtime")):
        names = [name for name in vars(ours) if not name.startswith("_") and name not in ("strategy", "cache")]
        assert [name for name in names if not hasattr(getattr(real, theirs), name)] == []
    for name in ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"):
        assert hasattr(real.ICudaEngine, name)
    kinds = ["DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy"]
    for kind in (*kinds, "DynamicShapesKernelSpecializationStrategy"):
        assert [m.name for m in getattr(module, kind) if not hasattr(getattr(real, kind), m.name)] == []
    assert [m.name for m in module.ILogger.Severity if not hasattr(real.ILogger.Severity, m.name)] == []


def test_without_a_driver_the_real_cuda_python_says_so() -> None:
    """The real answer of a machine without a GPU, where cuda-bindings is installed on one."""
    real = pytest.importorskip("cuda.bindings.runtime")
    error, _ = real.cudaGetDeviceCount()
    if error == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineUnavailable, match="no NVIDIA GPU can be used: cudaGetDeviceCount says cudaError"):
        device.Device()
