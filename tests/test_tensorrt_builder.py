"""Building TensorRT engines in a child process: what is built, and every way in which a build fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_building
from onnx import TensorProto, helper, numpy_helper

from edgeomni import tensorrt_builder, tensorrt_child
from edgeomni.errors import ExportError, UsageError
from edgeomni.tensorrt_builder import MARK, Recipe, build_engine, installed, predicted_bytes
from edgeomni.tensorrt_targets import TARGETS, built_anywhere, check_precision, parse_targets

needs_rtx = pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt-rtx is not installed")


def graph_file(path: Path, nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], weights: dict[str, Any]) -> Path:
    """An ONNX file whose only output is y, float."""
    ports = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    out = [helper.make_tensor_value_info("y", next(iter(inputs.values()))[0], None)]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", ports, out, stored), opset_imports=opsets, ir_version=11)
    path.write_bytes(model.SerializeToString())
    return path


def product(path: Path, width: int = 16) -> Path:
    """y = x w, x [n, width]."""
    weight = np.ones((width, 8), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    return graph_file(path, nodes, {"x": (TensorProto.FLOAT, ["n", width])}, {"w": weight})


SIZES = Recipe([{"x": [[1, 16], [2, 16], [4, 16]]}])


@needs_rtx
def test_an_engine_is_built_without_a_gpu(tmp_path: Path) -> None:
    """Several GPUs share one engine, the same graph gives an engine for each, and nothing else is left behind."""
    graph, said = product(tmp_path / "g.onnx"), list[str]()
    built = build_engine(graph, tmp_path / "g.engine", SIZES, ["sm_86", "sm_120"], progress=said.append)
    engine = (tmp_path / "g.engine").read_bytes()
    assert len(engine) > 10_000
    assert (built.package, built.version) == ("tensorrt_rtx", metadata.version("tensorrt-rtx"))
    assert built.seconds > 0 and built.peak_bytes > 50 << 20
    assert said[0].startswith("build g.onnx: about ") and said[0].endswith("GB of memory")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.engine", "g.onnx"]


@needs_rtx
def test_a_refused_operator_is_named(tmp_path: Path) -> None:
    """The operator that its parser does not know, by the node's name."""
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["y"], name="the_product")]
    ports = {"a": (TensorProto.INT8, [2, 4]), "b": (TensorProto.INT8, [4, 2])}
    graph = graph_file(tmp_path / "h.onnx", nodes, ports, {})
    with pytest.raises(ExportError, match="h.onnx: .*the_product.*MatMulInteger"):
        build_engine(graph, tmp_path / "h.engine", Recipe(), ["sm_89"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.onnx"]


@needs_rtx
def test_a_crash_of_tensorrt_becomes_an_error(tmp_path: Path) -> None:
    """Attention of one tensor with itself in float32 ends the process of TensorRT-RTX 1.7 by a signal."""
    nodes = [helper.make_node("Attention", ["q", "q", "q"], ["y"], name="the_attention")]
    graph = graph_file(tmp_path / "g.onnx", nodes, {"q": (TensorProto.FLOAT, [1, 4, 9, 16])}, {})
    with pytest.raises(ExportError, match=r"TensorRT .* g\.onnx.*the_attention.*onnx:PRECISION"):
        build_engine(graph, tmp_path / "g.engine", Recipe(), ["sm_89"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.onnx"]


@needs_rtx
def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot build g\.onnx"):
        build_engine(tmp_path / "g.onnx", tmp_path / "g.engine", Recipe(), ["sm_89"])


@needs_rtx
def test_sizes_that_contradict_the_graph_are_refused(tmp_path: Path) -> None:
    wrong = Recipe([{"x": [[4, 16], [2, 16], [1, 16]]}])
    with pytest.raises(ExportError, match=r"cannot build g\.onnx"):
        build_engine(product(tmp_path / "g.onnx"), tmp_path / "g.engine", wrong, ["sm_89"])


@needs_rtx
def test_memory_that_runs_out_becomes_an_error(tmp_path: Path) -> None:
    """The child may map no more than a little: loading or building ends in what TensorRT makes of that."""
    with pytest.raises(ExportError, match=r"memory|cannot|crashed"):
        build_engine(product(tmp_path / "g.onnx"), tmp_path / "g.engine", SIZES, ["sm_89"], memory_bytes=300 << 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.onnx"]


# --- the parent alone: a child of our own in place of the one that imports TensorRT


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the builder start a Python child that runs the code given, with its request as argument."""
    monkeypatch.setattr(tensorrt_builder, "installed", lambda: ("tensorrt_rtx",))
    start = subprocess.Popen

    def instead(code: str) -> None:
        def popen(command: list[str], **how: Any) -> Any:
            return start([sys.executable, "-c", code, command[-1]], **how)

        monkeypatch.setattr("edgeomni.tensorrt_builder.subprocess.Popen", popen)

    return instead


ANSWER = f"print('{MARK}' + json.dumps({{'version': '1', 'seconds': 2.0, 'peak_bytes': 3}}), flush=True)"
WRITE = "import json, pathlib, sys; r = json.load(open(sys.argv[1])); pathlib.Path(r['out']).write_bytes(b'engine')"


def build(tmp_path: Path, **how: Any) -> Any:
    return build_engine(product(tmp_path / "g.onnx"), tmp_path / "g.engine", SIZES, ["sm_89"], **how)


def test_what_the_child_wrote_is_renamed_when_it_is_whole(child: Any, tmp_path: Path) -> None:
    child(f"{WRITE}; print('from a library'); {ANSWER}")
    before = set(threading.enumerate())
    assert build(tmp_path).version == "1"
    waiting = [t for t in set(threading.enumerate()) - before if isinstance(t, threading.Timer)]
    assert all(t.finished.is_set() for t in waiting), "a timer would keep this process from ending"
    assert (tmp_path / "g.engine").read_bytes() == b"engine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.engine", "g.onnx"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ran out of memory"),
        ("import sys; sys.exit('std::bad_alloc')", "ran out of memory"),
        ("raise MemoryError", "ran out of memory"),
        ("import os; os.abort()", r"crashed \(signal SIGABRT\)"),
        (
            f"print('{MARK}' + '{{\"node\": \"n_Sin_3 [Sin]\"}}', flush=True); import os; os.abort()",
            r"node n_Sin_3 \[Sin\]",
        ),
        ("pass", r"crashed \(exit code 0\)"),
        (f"{WRITE}; {ANSWER}; sys.exit(3)", r"crashed \(exit code 3\)"),
    ],
)
def test_a_child_that_dies_leaves_an_error_and_no_file(child: Any, code: str, message: str, tmp_path: Path) -> None:
    child(code)
    (tmp_path / "g.engine").write_bytes(b"an older one")
    with pytest.raises(ExportError, match=message):
        build(tmp_path)
    assert (tmp_path / "g.engine").read_bytes() == b"an older one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.engine", "g.onnx"]


def test_a_child_that_hangs_is_ended(child: Any, tmp_path: Path) -> None:
    child("import time; time.sleep(600)")
    with pytest.raises(ExportError, match="took longer than 1 s"):
        build(tmp_path, timeout_s=0.6)


def test_interrupting_ends_the_child(child: Any, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    told = "print('" + MARK + '{"progress": "x"}' + "', flush=True)"
    child(f"import os, time; open({os.fspath(pid_file)!r}, 'w').write(str(os.getpid())); {told}; time.sleep(600)")

    def stop(step: str) -> None:
        if "about" not in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_too_little_memory_is_told_before_anything_starts(
    child: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child("raise SystemExit('must not start')")
    monkeypatch.setattr(tensorrt_builder, "_available_bytes", lambda: 100 << 20)
    with pytest.raises(ExportError, match=r"takes about 0\.5 GB of memory, and 0\.1 GB are free; .*another machine"):
        build(tmp_path)
    for enough in (300 << 20, None):  # more than half of what the prediction says, or unknown
        monkeypatch.setattr(tensorrt_builder, "_available_bytes", lambda enough=enough: enough)
        with pytest.raises(ExportError, match="must not start"):
            build(tmp_path)


def test_free_memory_counts_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [
        "MemTotal: 9000 kB\nMemAvailable:    3000 kB\nSwapTotal: 5000 kB\nSwapFree:  4000 kB\n",
        "MemTotal: 9 kB\n",
        "",
    ]
    monkeypatch.setattr(Path, "read_text", lambda _: told.pop(0))
    assert [tensorrt_builder._available_bytes() for _ in range(3)] == [7000 * 1024, None, None]


def test_the_prediction_counts_external_data(tmp_path: Path) -> None:
    graph = product(tmp_path / "g.onnx")
    before = predicted_bytes(graph)
    (tmp_path / "g.onnx.data").write_bytes(b"\0" * 1_000_000)
    assert predicted_bytes(graph) - before == pytest.approx(4_500_000, abs=1)


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "installed", lambda: ())
    with pytest.raises(ExportError, match=r"needs tensorrt-rtx, which is not installed: pip install .*\[tensorrt\]"):
        build(tmp_path)
    with pytest.raises(ExportError, match=r"needs tensorrt, which is not installed: pip install .*\[jetson\]"):
        build(tmp_path, package="tensorrt")
    with pytest.raises(ExportError, match="needs tensorrt-rtx or tensorrt"):
        build_engine(tmp_path / "g.onnx", tmp_path / "g.engine", SIZES)


# --- the child alone


@pytest.mark.parametrize("tf32", [False, True])
def test_flags_are_set_that_the_graph_and_the_runtime_rely_on(
    tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT rounds products of float32 unless told not to, and captures builds only without memory of its own."""
    cleared, given, created = list[str](), list[str](), list[int]()
    trt = types.ModuleType("tensorrt_rtx")
    trt.ILogger = type("ILogger", (), {})  # type: ignore[attr-defined]
    tensorrt_building.offer_builder(trt, "tensorrt_rtx", "1")
    config, network = tensorrt_building._Config, tensorrt_building._Network

    def create(_: Any, flags: int) -> Any:
        created.append(flags)
        return network()

    monkeypatch.setattr(config, "clear_flag", lambda _, flag: cleared.append(flag.name))
    monkeypatch.setattr(config, "set_flag", lambda _, flag: given.append(flag.name))
    monkeypatch.setattr(trt.Builder, "create_network", create)
    request = {"onnx": str(product(tmp_path / "g.onnx")), "out": str(tmp_path / "engine"), "package": "tensorrt_rtx"}
    tensorrt_child._build(trt, {**request, "capabilities": [], "recipe": {"tf32": tf32, "profiles": []}})
    assert (cleared, given, created) == ([] if tf32 else ["TF32"], ["REQUIRE_USER_ALLOCATION"], [1 << 1])


def test_where_memory_runs_out_the_child_is_ended_first() -> None:
    code = "from edgeomni.tensorrt_child import _be_the_first_to_go as f; f(); print(*open('/proc/self/oom_score_adj'))"
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **how).stdout.strip() == "1000"


# --- targets


def test_targets_are_read_and_ordered() -> None:
    assert parse_targets("sm_120, sm_89,sm_89") == ("sm_89", "sm_120")
    assert built_anywhere(("sm_87", "sm_89", "sm_90", "sm_110", "sm_121")) == ("sm_89", "sm_121")
    assert all(target.name == f"sm_{target.number}" for target in TARGETS.values())
    for text, message in (("sm_88", "unknown target 'sm_88'"), (" , ", "names no GPU"), ("89", "sm_89 is 8.9")):
        with pytest.raises(UsageError, match=message):
            parse_targets(text)


def test_a_precision_is_checked_against_each_target() -> None:
    check_precision("int4", ("sm_80", "sm_120"))
    check_precision("fp16", ("sm_75",))
    with pytest.raises(UsageError, match=r"sm_75 \(.*\) does not compute int4, which begins with sm_80"):
        check_precision("int4", ("sm_89", "sm_75"))


@pytest.mark.parametrize(
    ("precision", "unable", "able", "others"),
    [
        ("fp32", "sm_75", "sm_80", "fp16"),
        ("bf16", "sm_75", "sm_80", "int8 or fp16"),
        ("fp8", "sm_80", "sm_89", "int4 or int8 or fp16"),
        ("fp8", "sm_87", "sm_89", "int4 or int8 or fp16"),
        ("nvfp4", "sm_90", "sm_100", "int4 or int8 or fp16"),
    ],
)
def test_each_precision_has_an_oldest_gpu(precision: str, unable: str, able: str, others: str) -> None:
    check_precision(precision, (able, "sm_121"))
    check_precision("int8", (unable, able))
    with pytest.raises(UsageError, match=rf"{unable} .* {precision}, which begins with .*; use {others} for it"):
        check_precision(precision, (unable, able))


@needs_rtx
def test_the_table_of_targets_is_what_tensorrt_rtx_knows() -> None:
    """Asked in a child: TensorRT is not imported into the tests' process."""
    code = "import tensorrt_rtx as t; print(*[n for n in dir(t.ComputeCapability) if n.startswith('SM')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert {name.replace("SM", "sm_") for name in out.split()} == {n for n, t in TARGETS.items() if t.rtx}
