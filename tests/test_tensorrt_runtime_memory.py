"""Memory and engines that are owned and given back, and where an engine of a graph comes from, on recorded CUDA."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_recorder import Recorder, cudaError_t
from tensorrt_parts import machine, write_bundle

from edgeomni.bundle import Component
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.tensorrt import cache, sources
from edgeomni.runtimes.tensorrt.device import Device, Facts, acquire, release
from edgeomni.runtimes.tensorrt.memory import ALIGNMENT, Arena, Block, aligned, size_of
from edgeomni.runtimes.tensorrt.opening import Engines

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


# --- memory


@pytest.mark.parametrize(("size", "whole"), [(0, 0), (1, ALIGNMENT), (256, 256), (257, 512), (512, 512)])
def test_sizes_are_rounded_up_to_whole_alignments(size: int, whole: int) -> None:
    assert aligned(size) == whole


def test_sizes_do_not_overflow() -> None:
    assert size_of((70000, 70000), 2) == 9_800_000_000 and size_of((), 8) == 8 and size_of((0, 5), 4) == 0


def test_a_block_s_arrays_lie_apart_and_move_together(device: Device, cuda: Recorder) -> None:
    with device.lock:
        arena = Arena(device)
        block = Block(arena, {"a": ((3, 5), F32), "b": ((), I64), "c": ((0,), F32), "d": ((70,), F32)})
        assert block.size == 256 + 256 + 0 + 512 and "a" in block and "e" not in block
        assert [block.address(n) - block.address("a") for n in "abcd"] == [0, 256, 512, 512]
        assert block.address("a") % ALIGNMENT == 0
        block.host["a"][:], block.host["b"][...], block.host["d"][:] = np.arange(15).reshape(3, 5), 7, 1
        cuda.taken()
        block.upload()
        device.synchronize()
        there = cuda.span(block.address("a"), block.size, "device", "test")
        np.testing.assert_array_equal(there[: 15 * 4].view(np.float32), np.arange(15))
        assert there[256:264].view(np.int64) == 7 and (there[512:792].view(np.float32) == 1).all()
        block.upload(60)
        device.synchronize()
        block.download(8)
        device.synchronize()
        copies = [call for call in cuda.taken() if call.startswith("cudaMemcpy")]
        assert copies == [f"cudaMemcpyAsync {what}" for what in ("up 1024", "up 60", "down 8")]
        arena.close()


def test_a_block_of_nothing_has_memory_all_the_same(device: Device) -> None:
    with device.lock:
        arena = Arena(device)
        assert Block(arena, {"none": ((0,), F32)}).size == ALIGNMENT
        arena.close()


def test_new_memory_is_zeros_once_the_stream_gets_there(device: Device, cuda: Recorder) -> None:
    with device.lock:
        arena = Arena(device)
        address = arena.array(64)
        assert cuda.span(address, 64, "device", "test").all()
        device.synchronize()
        assert not cuda.span(address, 64, "device", "test").any()
        arena.close()


def test_an_arena_gives_back_in_the_opposite_order_and_once(device: Device) -> None:
    arena, order = Arena(device), list[int]()
    for i in range(3):
        arena.keep(lambda i=i: order.append(i))  # type: ignore[misc]
    assert not arena.closed
    for _ in range(2):
        arena.close()
    assert order == [2, 1, 0] and arena.closed


def test_an_arena_that_is_let_go_is_given_back_at_a_safe_moment(device: Device, cuda: Recorder) -> None:
    """Not at once: that may be while a graph is captured, or in a thread that does not hold the device."""
    with device.lock:
        arena = Arena(device)
        arena.array(8), arena.pinned(8)
        del arena
        gc.collect()
        assert cuda.leaks() == ["1 device", "1 pinned", "1 stream"]
        device.collect()
        assert cuda.leaks() == ["1 stream"] and not device.garbage


def test_one_failure_does_not_keep_the_rest_from_being_given_back(
    device: Device, cuda: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> None:
        raise EngineError("cannot")

    arena, order = Arena(device), list[str]()
    arena.keep(lambda: order.append("first"))
    arena.keep(failing)
    arena.keep(lambda: order.append("last"))
    arena.close()
    assert order == ["last", "first"] and "could not be given back: cannot" in caplog.text


# --- one component's engines


def test_the_last_use_of_the_device_ends_it(cuda: Recorder) -> None:
    with machine(cuda):
        first, second = acquire(), acquire()
        assert first is second
        release(first)
        assert cuda.leaks() == ["1 stream"]
        release(second)
        assert cuda.leaks() == []
        third = acquire()
        assert third is not first
        release(third)


def test_engines_that_cannot_be_found_give_the_device_back(cuda: Recorder) -> None:
    def find(facts: Facts) -> Any:
        assert (facts.name, facts.sm, facts.driver) == ("NVIDIA Recorder", "sm_89", 13000)
        raise ZeroDivisionError

    with machine(cuda), pytest.raises(ZeroDivisionError):
        Engines("llm", find)
    assert cuda.leaks() == []


def test_a_block_that_fails_while_opening_gives_all_back(cuda: Recorder) -> None:
    with machine(cuda):
        engines = Engines("codec", lambda facts: {})
        assert engines.scratch() == (0, 0)
        with pytest.raises(KeyError), engines.opening():
            engines.open("codec")
        assert engines.closed and cuda.leaks() == []
        with pytest.raises(EngineError, match="this codec is closed; open it again"), engines.using():
            raise AssertionError("not reached")


# --- which package, which driver


@pytest.mark.parametrize(
    ("sm", "there", "package"),
    [
        ("sm_89", ["tensorrt", "tensorrt_rtx"], "tensorrt_rtx"),
        ("sm_89", ["tensorrt"], "tensorrt"),
        ("sm_87", ["tensorrt", "tensorrt_rtx"], "tensorrt"),
        ("sm_90", ["tensorrt", "tensorrt_rtx"], "tensorrt"),
        ("sm_999", ["tensorrt"], "tensorrt"),
        ("sm_89", [], "[tensorrt]"),
        ("sm_87", ["tensorrt_rtx"], "[jetson]"),
        ("sm_999", ["tensorrt_rtx"], "[jetson]"),
    ],
)
def test_the_package_that_builds_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, sm: str, there: list[str], package: str
) -> None:
    monkeypatch.setattr(sources, "installed", lambda names: [n for n in names if n in there])
    monkeypatch.setattr(sources, "too_old", lambda name: "")
    facts, component = Facts("GPU", sm, 13000), Component("llm", "tensorrt", "tensorrt", "fp16", {}, {}, {})
    if not package.startswith("["):
        assert sources._package(facts, component, "why") == package
        return
    with pytest.raises(EngineUnavailable) as caught:
        sources._package(facts, component, "the bundle brings none")
    assert package in str(caught.value) and "the bundle brings none" in str(caught.value)
    assert caught.value.kind == "package"


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n",
            "13000 535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "13000 540.4.0"),
        ("NVRM version: 580.65\n", "13000 580.65"),
        ("no number", "13000"),
        (None, "13000"),
    ],
)
def test_the_driver_that_an_engine_was_built_under(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, driver: str
) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(sources, "_DRIVER", tmp_path / "version")
    assert sources._driver(Facts("GPU", "sm_89", 13000)) == driver


def test_each_graph_has_a_key_of_its_own(tiny_model: OmniModel, tmp_path: Path) -> None:
    """A change of any of what an engine depends on is another key, and so another place in the cache."""
    bundle = write_bundle(tiny_model, tmp_path / "tiny", sms=())
    llm = bundle.manifest.components["llm"]
    library: Any = type("Library", (), {"name": "tensorrt", "version": "10.15"})
    keys = [sources._key(bundle, llm, role, Facts("GPU", "sm_87", 12060), library) for role in llm.graphs]
    assert [k.role for k in keys] == list(llm.graphs) and len({k.folder for k in keys}) == len(keys)
    assert all(k.kernels.parent.name == "kernels" and k.kernels.name == k.digest for k in keys)
    first = keys[0]
    assert (first.gpu, first.sm, first.package, first.version) == ("GPU", "sm_87", "tensorrt", "10.15")
    assert (first.bundle, first.component, first.precision) == (bundle.digest, "llm", llm.precision)
    assert first.driver.startswith("12060")


# --- the cache's neighbours


def test_what_is_not_an_engine_s_entry_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken entry is left to the build that needs its place; compiled kernels are no entry."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = cache.Key("GPU", "sm_87", "12060", "tensorrt", "10.7", "d" * 64, "llm", "body", "int4")
    broken, kernels = key.folder.parent / ("f" * 40), key.kernels
    for path, text in ((broken / "engine.json", "{"), (kernels, "compiled")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with cache.storing(key) as path:
        path.write_bytes(b"an engine")
    assert (broken / "engine.json").is_file() and kernels.read_text() == "compiled"
    assert cache.find(key) is not None


def test_a_disk_that_fails_while_an_engine_is_stored_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = cache.Key("GPU", "sm_87", "12060", "tensorrt", "10.7", "d" * 64, "llm", "body", "int4")
    with pytest.raises(EngineUnavailable, match="cannot be kept in .*No space left") as caught, cache.storing(key):
        raise OSError(28, "No space left on device")
    assert caught.value.kind == "graph" and not key.folder.exists()


def test_a_freed_device_does_not_hide_why_it_failed(cuda: Recorder) -> None:
    cuda.failing["cudaStreamCreateWithFlags"] = cudaError_t.cudaErrorIllegalAddress
    with machine(cuda), pytest.raises(EngineError, match="cudaStreamCreateWithFlags says cudaErrorIllegalAddress"):
        acquire()
    cuda.failing.clear()
    with machine(cuda):
        release(acquire())
