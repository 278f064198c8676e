"""One engine of TensorRT on recorded CUDA: which profile takes which shapes, what it refuses, and work that repeats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_recorder
from cuda_recorder import Recorder, cudaError_t
from tensorrt_building import engine_bytes
from tensorrt_parts import Machine, machine, write_bundle

from edgeomni.bundle import Bundle
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.tensorrt import engine as engines
from edgeomni.runtimes.tensorrt.device import Device, acquire, release
from edgeomni.runtimes.tensorrt.engine import Engine, Repeated
from edgeomni.runtimes.tensorrt.library import library_of
from edgeomni.runtimes.tensorrt.memory import ALIGNMENT, Arena, Block

PROFILES = [
    {"x": [[1, 1], [1, 4], [1, 64]], "scale": [[1], [1], [1]]},
    {"x": [[1, 1], [2, 1], [2, 8]], "scale": [[1], [1], [1]]},
    {"x": [[3, 2], [3, 2], [3, 2]], "scale": [[1], [1], [1]]},
]


@dataclass
class Bench:
    """A recorded machine with its device, an arena on it, and the bytes of an engine for y = x * scale."""

    machine: Machine
    device: Device
    arena: Arena
    data: bytes

    @property
    def cuda(self) -> Recorder:
        return self.machine.cuda

    def engine(self) -> Engine:
        return Engine(library_of("tensorrt_rtx"), self.device, self.data, "test/scaled")

    def context(self, engine: Engine, shape: tuple[int, ...], *, fixed: bool = False) -> tuple[Any, Block, Block]:
        """A context with the blocks of its inputs and of its output."""
        scratch, dtype = self.arena.array(engine.scratch), np.dtype(np.float32)
        context = engine.context(self.arena, (scratch, engine.scratch), {"x": shape}, fixed=fixed)
        inputs = Block(self.arena, {"x": ((2, 64), dtype), "scale": ((1,), dtype)})
        output = Block(self.arena, {"y": ((2, 64), dtype)})
        for block, name in ((inputs, "x"), (inputs, "scale"), (output, "y")):
            context.bind(name, block.address(name))
        return context, inputs, output


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", "bn"), ("scale", [1]))]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, "bn")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Mul", ["x", "scale"], ["y"])], "scaled", ports, [y])
    path = tmp_path / "scaled.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    with machine() as recorded:
        device = acquire()
        with device.lock:
            arena = Arena(device)
            yield Bench(recorded, device, arena, engine_bytes(path, PROFILES))
            arena.close()
        release(device)
    assert recorded.cuda.leaks() == []


# --- profiles and shapes


@pytest.mark.parametrize(
    ("shape", "profile"),
    [((1, 1), 1), ((1, 8), 1), ((2, 8), 1), ((1, 9), 0), ((1, 64), 0), ((3, 2), 2), ((2, -1), 1), ((-1, 64), 0)],
)
def test_the_tightest_profile_that_takes_a_shape(bench: Bench, shape: tuple[int, ...], profile: int) -> None:
    assert bench.engine().profile_for({"x": shape}) == profile


@pytest.mark.parametrize("shape", [(1, 65), (2, 9), (3, 1), (3, 3), (4, 1), (0, 1), (1, 0), (1,), (1, 1, 1)])
def test_a_shape_that_no_profile_takes(bench: Bench, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"test/scaled: the engine was built for other shapes than x \["):
        bench.engine().profile_for({"x": shape})


def test_the_largest_size_among_profiles(bench: Bench) -> None:
    engine = bench.engine()
    assert [engine.most("x", 1, {"x": (rows, -1)}) for rows in (1, 2, 3, 4)] == [64, 8, 2, 0]
    assert engine.most("x", 0, {"x": (-1, 8)}) == 2 and engine.most("scale", 0, {}) == 1


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"x": (2, 5), "y": (-1, 7), "scale": (1,)}, ""),
        ({"scale": (-1,)}, ""),
        ({"scale": (2,)}, r"scale is \[1\], and this model needs \[2\]"),
        ({"scale": (1, 1)}, "and this model needs"),
        ({"x": (1,)}, "and this model needs"),
        ({"z": (1,), "w": (1,)}, "has no tensor z, w"),
    ],
)
def test_shapes_that_an_engine_must_have(bench: Bench, shapes: dict[str, tuple[int, ...]], told: str) -> None:
    if not told:
        return bench.engine().need_shapes(shapes)
    with pytest.raises(EngineError, match=told):
        bench.engine().need_shapes(shapes)


def test_a_tensor_tells_its_type(bench: Bench) -> None:
    x = bench.engine().tensors["x"]
    assert (x.shape, x.itemsize, x.is_input) == ((-1, -1), 4, True) and x.raw == x.numbers == np.float32
    unknown = replace(x, dtype=None, itemsize=2)
    assert unknown.raw == np.uint16
    with pytest.raises(EngineError, match="x has a type that numpy does not know"):
        assert unknown.numbers


# --- contexts


def test_a_run_is_there_when_it_is_waited_for(bench: Bench) -> None:
    engine = bench.engine()
    context, inputs, output = bench.context(engine, (2, 3))
    assert context.shape("y") == (2, 3)
    inputs.host["x"].reshape(-1)[:6], inputs.host["scale"][:] = np.arange(6), 3
    inputs.upload()
    context.enqueue()
    output.download()
    bench.device.synchronize()
    np.testing.assert_array_equal(output.host["y"].reshape(-1)[:6], 3 * np.arange(6))
    with pytest.raises(EngineError, match=r"test/scaled: TensorRT cannot give x the shape \[2, 9\]"):
        context.reshape("x", (2, 9))
    with pytest.raises(EngineError, match="cannot bind nothing"):
        context.bind("nothing", inputs.address("x"))
    with pytest.raises(EngineError, match=f"no multiple of {ALIGNMENT}"):
        context.bind("x", inputs.address("x") + ALIGNMENT // 2)


def test_scratch_memory_that_is_too_small_is_refused(bench: Bench) -> None:
    engine = bench.engine()
    address = bench.arena.array(engine.scratch)
    with pytest.raises(EngineError, match="bytes of scratch memory are needed"):
        engine.context(bench.arena, (address, engine.scratch - 1), {"x": (1, 1)}, fixed=False)


def test_an_engine_without_scratch_memory_needs_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.engine()
    engine.scratch = 0
    monkeypatch.setattr("tensorrt_context.Context.set_device_memory", None)
    engine.context(bench.arena, (0, 0), {"x": (1, 1)}, fixed=False)


def test_a_context_that_cannot_be_made_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorrt_recorder._Engine.create_execution_context", lambda self, how: None)
    with pytest.raises(EngineError, match="test/scaled: TensorRT cannot make an execution context"):
        bench.context(bench.engine(), (1, 1))


def test_kernels_are_made_for_fixed_shapes_alone_where_shapes_are_fixed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    real = tensorrt_recorder._Engine.create_execution_context

    def keeping(self: Any, config: Any) -> Any:
        kept.append(config)
        return real(self, config)

    monkeypatch.setattr("tensorrt_recorder._Engine.create_execution_context", keeping)
    for fixed in (True, False):
        bench.context(bench.engine(), (1, 1), fixed=fixed)
    assert [c.dynamic_shapes_kernel_specialization_strategy.name for c in kept] == ["EAGER", "LAZY"]


# --- memory


def test_an_engine_larger_than_the_free_memory_is_not_read(bench: Bench) -> None:
    bench.cuda.total = bench.cuda.used() + len(bench.data) - 1
    bench.cuda.taken()
    with pytest.raises(EngineUnavailable, match="the engine has .* MiB of GPU memory are free") as caught:
        bench.engine()
    assert caught.value.kind == "memory" and "deserialize_cuda_engine" not in bench.cuda.taken()
    bench.cuda.total += 1
    bench.engine()


# --- repeated work


def test_repeated_work_runs_once_is_captured_and_then_launched(bench: Bench) -> None:
    context, *_ = bench.context(bench.engine(), (1, 4), fixed=True)
    repeated = Repeated(bench.arena, (context,), context.enqueue)
    calls = []
    for _ in range(4):
        bench.cuda.taken()
        repeated.run()
        calls.append([c.split()[0] for c in bench.cuda.taken() if c != "cudaStreamSynchronize"])
    capture = ["cudaStreamBeginCapture", "execute_async_v3", "cudaStreamEndCapture", "cudaGraphInstantiate"]
    assert calls[0] == ["execute_async_v3"]
    assert calls[1] == [*capture, "cudaGraphDestroy", "cudaGraphLaunch"]
    assert calls[2] == calls[3] == ["cudaGraphLaunch"]


def test_a_context_that_cannot_be_captured_is_asked_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("tensorrt_context.Context.is_stream_capturable", lambda self, stream: asked.append(stream))
    context, *_ = bench.context(bench.engine(), (1, 4), fixed=True)
    repeated = Repeated(bench.arena, (context,), context.enqueue)
    bench.cuda.taken()
    for _ in range(4):
        repeated.run()
    calls = [c.split()[0] for c in bench.cuda.taken()]
    assert calls.count("execute_async_v3") == 4 and "cudaStreamBeginCapture" not in calls
    assert asked == [bench.device.stream] and caplog.text.count("CUDA graphs are not used") == 1


def test_work_of_several_contexts_is_captured_where_all_can_be(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = tuple(bench.context(bench.engine(), (1, 4), fixed=True)[0] for _ in range(2))
    for context, can in zip(contexts, (True, False), strict=True):
        monkeypatch.setattr(context, "capturable", lambda can=can: can)
    repeated = Repeated(bench.arena, contexts, contexts[0].enqueue)
    bench.cuda.taken()
    for _ in range(2):
        repeated.run()
    assert not [c for c in bench.cuda.taken() if c.startswith("cudaStreamBegin")]


def test_a_tensorrt_without_that_question_is_captured_unasked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tensorrt_context.Context.is_stream_capturable")
    context, *_ = bench.context(bench.engine(), (1, 4), fixed=True)
    assert context.capturable()


def test_work_that_fails_halfway_is_waited_for_before_its_memory_goes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorRT has put into the stream before it gave up is there, though the call says no."""
    context, *_ = bench.context(bench.engine(), (1, 4))
    real = type(context._context).execute_async_v3
    monkeypatch.setattr("tensorrt_context.Context.execute_async_v3", lambda self, stream: not real(self, stream))
    bench.device.synchronize()
    with pytest.raises(EngineError, match="TensorRT cannot run"):
        context.enqueue()
    bench.arena.close()


def test_a_failed_wait_is_told_again_by_the_next_one(bench: Bench) -> None:
    bench.arena.array(8)
    bench.cuda.failing["cudaStreamSynchronize"] = cudaError_t.cudaErrorIllegalAddress
    for _ in range(2):
        with pytest.raises(EngineError, match="the GPU failed"):
            bench.device.synchronize()
    bench.cuda.failing.clear()
    bench.device.synchronize()
    bench.cuda.taken()
    bench.device.synchronize()
    assert bench.cuda.taken() == [], "nothing waits any more"


# --- engines of another model


@pytest.fixture(scope="module")
def tiny(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "tiny")


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("llm", "inputs_embeds"),
        ("llm", "write_indices"),
        ("llm", "hidden"),
        ("llm", "logits"),
        ("llm", "past_key.0"),
        ("encoder", "features"),
    ],
)
def test_an_engine_that_lacks_a_tensor_is_refused(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, component: str, name: str
) -> None:
    real = engines.Engine._read_tensors
    monkeypatch.setattr(engines.Engine, "_read_tensors", lambda s, lib: [t for t in real(s, lib) if t.name != name])
    with machine() as recorded:
        with pytest.raises(EngineError, match=f"the engine has no tensor {name}"):
            recorded.open(tiny, component)
        assert recorded.cuda.leaks() == []
