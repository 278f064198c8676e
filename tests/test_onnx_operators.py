"""Each operator of both sets, run by ONNX Runtime, against the formula in numpy."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import edgeomni.exporters.onnx as package
from edgeomni.arrays import F32
from edgeomni.bundle import Port
from edgeomni.errors import ExportError
from edgeomni.exporters.onnx.attention import attention_for
from edgeomni.exporters.onnx.graph import FLOAT, Graph, signature
from edgeomni.exporters.onnx.operators import Operators, operators_for
from edgeomni.quantize import schemes
from edgeomni.quantize.schemes import Scheme, dequantize, quantize

FLAVOURS: list[Any] = ["ort", "portable"]
B, S, K, N = 2, 3, 64, 40


def normal(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(operators: Operators, path: Path, outputs: list[str], **given: F32) -> list[F32]:
    return opened(operators, path, outputs, whole=False, given=given)


def opened(operators: Operators, path: Path, outputs: list[str], whole: bool, given: dict[str, F32]) -> list[F32]:
    """`whole`: as an engine opens it, optimised, and without overflow on x86 that lacks VNNI."""
    for i, value in enumerate(outputs):
        operators.graph.output(f"out{i}", FLOAT, [], value)
    operators.graph.save(path)
    model = onnx.load(path)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    model.ir_version = 10
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not whole:  # as written: ONNX Runtime's optimiser would fuse standard operators into its own
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, given))


def built(flavour: Any, **shapes: list[Any]) -> Operators:
    operators = operators_for(flavour, "g")
    for name, shape in shapes.items():
        operators.graph.input(name, FLOAT, shape)
    return operators


def of_one(flavour: Any, path: Path, x: F32, make: Callable[[Operators], str], whole: bool = False) -> F32:
    operators = built(flavour, x=list(x.shape))
    return opened(operators, path / "g.onnx", [make(operators)], whole, {"x": x})[0]


KINDS = [Scheme("fp32"), Scheme("fp16"), Scheme("int8", 32), Scheme("int4", 16), Scheme("int8_dynamic")]


def of_flavour(scheme: Scheme, flavour: str) -> Scheme:
    return Scheme(scheme.kind, scheme.block, signed=True) if scheme.blocked and flavour == "portable" else scheme


def close(y: F32, exact: F32, scheme: Scheme, flavour: str) -> bool:
    """Portable graphs compute in float; the fused integer kernels round what they multiply with to 8 bits."""
    rounds = flavour == "ort" and scheme.kind not in ("fp32", "fp16")
    return bool(np.linalg.norm(y - exact) <= (0.02 if rounds else 1e-6) * np.linalg.norm(exact))


@pytest.mark.parametrize("scheme", KINDS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_linear(flavour: Any, biased: bool, scheme: Scheme, tmp_path: Path) -> None:
    scheme = of_flavour(scheme, flavour)
    x, packed, bias = normal(B, S, K), quantize(normal(N, K, seed=1), scheme), 9 * normal(N, seed=2)
    whole = scheme.kind == "int8_dynamic" and flavour == "ort"
    y = of_one(flavour, tmp_path, x, lambda o: o.linear("x", "w", packed, bias if biased else None), whole)
    assert y.shape == (B, S, N)
    assert close(y - bias * biased, x @ dequantize(packed).T, scheme, flavour)


@pytest.mark.parametrize("scheme", KINDS[:-1], ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rows_linear(flavour: Any, scheme: Scheme, tmp_path: Path) -> None:
    scheme = of_flavour(scheme, flavour)
    x, packed = normal(1, 1, K), quantize(normal(N, K, seed=1), scheme)
    y = of_one(flavour, tmp_path, x, lambda o: o.rows_linear("x", "w", packed))
    assert y.shape == (1, 1, N)
    assert close(y, x @ dequantize(packed).T, scheme, flavour)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_weights_of_another_formats_kind_are_refused(flavour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_KINDS", dict(schemes._KINDS))
    fp32 = schemes.kind_of("fp32")
    schemes.register(schemes.Kind("toy", 6.5, "weight-only", fp32.pack, fp32.unpack, block=32))
    packed = quantize(normal(N, K), Scheme("toy"))
    for method in ("linear", "rows_linear"):
        with pytest.raises(ExportError, match="toy weights"):
            getattr(built(flavour, x=[1, 1, K]), method)("x", "w", packed)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rms_norm(flavour: Any, tmp_path: Path) -> None:
    x, gain, eps = 0.01 * normal(B, S, K), normal(K, seed=1), 1e-4
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
    y = of_one(flavour, tmp_path, x, lambda o: o.rms_norm("x", gain, "gain", eps))
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_add_rms_norm(flavour: Any, tmp_path: Path) -> None:
    x, r, gain, eps = 0.01 * normal(B, S, K), 0.01 * normal(B, S, K, seed=3), normal(K, seed=1), 1e-4
    operators = built(flavour, x=[B, S, K], r=[B, S, K])
    outputs = operators.add_rms_norm("x", "r", gain, "gain", eps)
    normed, total = run(operators, tmp_path / "g.onnx", list(outputs), x=x, r=r)
    np.testing.assert_allclose(total, x + r, atol=1e-7)
    np.testing.assert_allclose(normed, total / np.sqrt((total**2).mean(-1, keepdims=True) + eps) * gain, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_activations(flavour: Any, tmp_path: Path) -> None:
    x = np.linspace(-8, 8, 161, dtype=np.float32)[None, None]
    silu = of_one(flavour, tmp_path, x, lambda o: o.silu("x"))
    np.testing.assert_allclose(silu, x / (1 + np.exp(-x)), atol=1e-5)
    gelu = of_one(flavour, tmp_path, x, lambda o: o.gelu("x"))
    np.testing.assert_allclose(gelu, torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_attention(flavour: Any, tmp_path: Path) -> None:
    heads = 4
    given = {name: normal(1, 5, K, seed=i) for i, name in enumerate("qkv")}
    operators = built(flavour, **{name: list(x.shape) for name, x in given.items()})
    (y,) = run(operators, tmp_path / "g.onnx", [operators.attention("q", "k", "v", heads)], **given)
    q, k, v = (x.reshape(5, heads, -1).swapaxes(0, 1) for x in given.values())
    scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(K / heads))
    expected = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(1, 5, K)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_convolutions(flavour: Any, biased: bool, depthwise: bool, tmp_path: Path) -> None:
    channels, length, dilation = 6, 30, 3
    groups = channels if depthwise else 2
    x, weight, bias = (
        normal(1, channels, length),
        normal(channels, channels // groups, 5, seed=1),
        normal(channels, seed=2),
    )

    def make(o: Operators) -> str:
        kernel = o.graph.floats("w", o.depthwise_kernel(weight) if depthwise else weight)
        names = [kernel, o.graph.floats("b", bias)] if biased else [kernel]
        return (o.depthwise_conv if depthwise else o.conv)("x", names, groups, dilation)

    tensors = [torch.from_numpy(a) for a in (x, weight, bias)]
    expected = torch.nn.functional.conv1d(*tensors[: 2 + biased], dilation=dilation, groups=groups).numpy()
    np.testing.assert_allclose(of_one(flavour, tmp_path, x, make), expected, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_snake(flavour: Any, tmp_path: Path) -> None:
    """With the factors that neighbours fold in, it is x + sin(alpha x)^2 / alpha."""
    x, alpha = np.linspace(-20, 20, 4001, dtype=np.float32)[None, None], 1.7
    operators = operators_for(flavour, "g")
    y = of_one(flavour, tmp_path, x * np.float32(alpha / operators.snake_period), lambda o: o.snake("x"))
    y = y * (operators.snake_gain / alpha)
    np.testing.assert_allclose(y, x + np.sin(alpha * x.astype(np.float64)) ** 2 / alpha, atol=2e-5)


def test_each_flavour_has_its_operators_attention_and_opset() -> None:
    fused, portable = operators_for("ort", "a"), operators_for("portable", "b")
    assert [(o.graph.name, o.graph.opset) for o in (fused, portable)] == [("a", 21), ("b", 24)]
    assert operators_for("portable", "c", 22).graph.opset == 22
    assert (fused.takes_wanted, portable.takes_wanted) == (True, False)
    kinds = {(f, n): attention_for(f, n) for f in FLAVOURS for n in (16, 24, 64)}
    assert {key: kind.name for key, kind in kinds.items()} == {
        ("ort", 16): "gqa",
        ("ort", 24): "scatter",
        ("ort", 64): "gqa",
        **{("portable", n): "scatter" for n in (16, 24, 64)},
    }
    assert {kind.name: kind.opset for kind in kinds.values()} == {"gqa": 21, "scatter": 24}


def test_nodes_with_one_and_with_several_outputs() -> None:
    g = Graph("g")
    assert g.op("Relu", ["x"], output="named") == "named"
    assert isinstance(g.op("Relu", ["x"]), str)
    assert len(set(g.ops("Split", ["x"], 3, axis=0))) == 3
    assert g.ops("Split", ["x"], ["a", "", "b"], axis=0) == ["a", "", "b"]
    assert len(g.split("x", 2, axis=1)) == 2


def test_constants_of_plain_numbers_are_vectors_of_float32() -> None:
    g = Graph("g")
    g.floats("one", 0.5)
    g.floats("matrix", np.eye(2))
    shapes = {name: (value.dtype, value.shape) for name, value in g.constants.items()}
    assert shapes == {"one": (np.float32, (1,)), "matrix": (np.float32, (2, 2))}


def test_the_exporters_modules_import_each_other_in_one_direction() -> None:
    """Imports for type checkers count as well."""
    folder = Path(str(package.__file__)).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    imports = {name: imported(folder / f"{name}.py") & names for name in names}
    assert "graph" in imports["operators"] and "codec_builder" in imports["snake"]
    while leaves := {name for name, below in imports.items() if not below}:
        imports = {name: below - leaves for name, below in imports.items() if name not in leaves}
    assert imports == {}, "these import each other in a circle"


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package.__name__):
            found |= {str(node.module).rpartition(".")[2], *(alias.name for alias in node.names)}
    return found


def test_large_constants_lie_on_pages_beside_the_graph_and_small_ones_in_it(tmp_path: Path) -> None:
    g = Graph("g")
    sizes = {"small": 255, "large": 256, "larger": 300}  # in floats: 1020, 1024 and 1200 bytes
    for name, n in sizes.items():
        g.floats(name, np.arange(n))
    assert g.save(tmp_path / "g.onnx") == [tmp_path / "g.onnx", tmp_path / "g.onnx.data"]
    tensors = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph.initializer
    places = {t.name: {e.key: e.value for e in t.external_data} for t in tensors}
    assert places == {
        "small": {},
        "large": {"location": "g.onnx.data", "offset": "0", "length": "1024"},
        "larger": {"location": "g.onnx.data", "offset": "4096", "length": "1200"},
    }
    assert (tmp_path / "g.onnx.data").stat().st_size == 4096 + 1200
    for tensor in onnx.load(tmp_path / "g.onnx").graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), np.arange(sizes[tensor.name]))


def test_a_graph_of_small_constants_is_one_file(tmp_path: Path) -> None:
    g = Graph("g")
    g.floats("small", np.zeros(8))
    assert g.save(tmp_path / "g.onnx") == [tmp_path / "g.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["g.onnx"]


def test_files_declare_the_oldest_format_that_their_operators_allow(tmp_path: Path) -> None:
    for opset, ir_version in ((21, 10), (24, 11)):
        Graph("g", opset).save(tmp_path / "g.onnx")
        model = onnx.load(tmp_path / "g.onnx")
        assert {o.domain: o.version for o in model.opset_import} == {"": opset, "com.microsoft": 1}
        assert model.ir_version == ir_version


def test_a_signature_tells_names_types_and_shapes(tmp_path: Path) -> None:
    g = Graph("g")
    g.output("y", FLOAT, [1, "n", 8], g.op("Identity", [g.input("x", FLOAT, [1, "n", 8])]))
    (path,) = g.save(tmp_path / "g.onnx")
    assert signature(path) == ([Port("x", "float", [1, "n", 8])], [Port("y", "float", [1, "n", 8])])
