"""Weights found again in graphs: small graphs written here by hand, as the tracing exporters write theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_onnx import node, saved

from edgeomni.errors import CheckpointError
from edgeomni.model import onnx_constants
from edgeomni.model.graph_weights import Constant, Role, Use, found

HERE = Path("model.onnx")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def constant(tensor: torch.Tensor, *uses: Use, names: tuple[str, ...] = ()) -> Constant:
    return Constant(names, tuple(tensor.shape), uses, lambda: tensor)


def the(role: Role, scope: str = "fc", flipped: bool = False) -> Use:
    return Use(scope, role, flipped)


# --- which tensor is which


def test_a_weight_is_looked_for_where_it_is_used_and_then_by_its_name() -> None:
    used, named, other = numbers(2, 3), numbers(2, 3, seed=1), numbers(2, 3, seed=2)
    constants = [constant(named, names=("fc.weight",)), constant(used, the("weight")), constant(other, the("bias"))]
    assert torch.equal(found(HERE, constants, {"fc.weight": (2, 3)})["fc.weight"], used)
    assert torch.equal(found(HERE, constants[::2], {"fc.weight": (2, 3)})["fc.weight"], named)
    misled = [constant(numbers(2, 4), the("weight")), *constants[::2]]
    assert torch.equal(found(HERE, misled, {"fc.weight": (2, 3)})["fc.weight"], named), (
        "what is used there has another shape"
    )
    two = [constants[1], constant(other, the("weight")), constants[0]]
    assert torch.equal(found(HERE, two, {"fc.weight": (2, 3)})["fc.weight"], named), "two are used there"


@pytest.mark.parametrize("prefix", ["", "model.", "encoder.", "model.encoder."])
def test_exporters_put_something_before_the_names(prefix: str) -> None:
    tensor = numbers(2, 3)
    for one in (constant(tensor, the("weight", f"{prefix}a.fc")), constant(tensor, names=(f"{prefix}a.fc.weight",))):
        assert torch.equal(
            found(HERE, [one, constant(numbers(2, 3, seed=1))], {"a.fc.weight": (2, 3)})["a.fc.weight"], tensor
        )


def test_one_tensor_may_be_used_twice_and_for_two_names() -> None:
    tensor = numbers(4)
    twice = constant(tensor, the("bias"), the("bias"), the("bias", "gc"))
    read = found(HERE, [twice], {"fc.bias": (4,), "gc.bias": (4,)})
    assert torch.equal(read["fc.bias"], tensor) and torch.equal(read["gc.bias"], tensor)


def test_matrices_are_turned_and_get_back_their_dimensions_of_size_one() -> None:
    matrix, flat, kernel = numbers(2, 3), numbers(1, 1, 5), numbers(2, 3, 1)
    constants = [
        constant(matrix, the("weight", flipped=True)),
        constant(flat, the("bias", "norm")),
        constant(kernel[None], the("weight", "conv")),
    ]
    read = found(HERE, constants, {"fc.weight": (3, 2), "norm.bias": (5,), "conv.weight": (2, 3, 1)})
    assert torch.equal(read["fc.weight"], matrix.T) and read["fc.weight"].is_contiguous()
    assert torch.equal(read["norm.bias"], flat[0, 0]) and torch.equal(read["conv.weight"], kernel)
    with pytest.raises(CheckpointError, match=r"could be norm\.weight \(5,\); "):
        found(HERE, constants, {"fc.weight": (3, 2), "norm.weight": (5,)})


def test_what_no_module_uses_is_the_only_matrix_left_of_its_shape() -> None:
    table, taken = numbers(4, 3), numbers(4, 3, seed=1)
    constants = [constant(taken, the("weight")), constant(table, the("bias", ""), names=("onnx::Add_7",))]
    expected = {"positions.weight": (4, 3), "fc.weight": (4, 3)}
    assert torch.equal(found(HERE, constants, expected)["positions.weight"], table)
    with pytest.raises(CheckpointError, match=r"positions\.weight \(4, 3\); "):
        found(HERE, [*constants, constant(numbers(4, 3, seed=2))], expected)
    with pytest.raises(CheckpointError, match=r"positions\.weight \(4, 3\)"):
        found(HERE, constants[:1], expected)
    with pytest.raises(CheckpointError, match="scale"):  # a vector says too little to be known by its length
        found(HERE, [constant(numbers(4))], {"norm.scale": (4,)})


@pytest.mark.parametrize(("count", "more"), [(8, ""), (9, " and 1 more"), (11, " and 3 more")])
def test_the_first_eight_that_are_missing_are_named(count: int, more: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        found(Path("x/model.onnx"), [], {f"w{i}": (i + 1, 2) for i in range(count)})
    named = ", ".join(f"w{i} ({i + 1}, 2)" for i in range(8))
    assert str(caught.value).startswith(f"x/model.onnx: holds no tensor that could be {named}{more}; graphs that were")


# --- ONNX

TURNED = node("Transpose", "w", out="v", perm=[1, 0])


@pytest.mark.parametrize(
    ("nodes", "use"),
    [
        ([node("MatMul", "x", "w")], the("weight", flipped=True)),
        ([TURNED, node("MatMul", "x", "v")], the("weight")),
        ([TURNED, node("Transpose", "v", out="u", perm=[1, 0]), node("MatMul", "x", "u")], the("weight", flipped=True)),
        ([node("Cast", "w", out="v", to=1), node("Identity", "v", out="u"), node("Gather", "u", "x")], the("weight")),
        ([node("Gemm", "x", "w", "x", transB=1)], the("weight")),
        ([node("Gemm", "x", "w", "x", transB=0)], the("weight", flipped=True)),
        ([node("Gemm", "x", "w", "x", transA=1)], the("weight", flipped=True)),
        ([TURNED, node("Gemm", "x", "v", "x")], the("weight")),
        ([TURNED, node("Gemm", "x", "v", "x", transB=1)], the("weight", flipped=True)),
        ([node("Gemm", "x", "x", "w")], the("bias")),
        ([node("Conv", "x", "w")], the("weight")),
        ([node("Conv", "x", "x", "w")], the("bias")),
        ([node("LayerNormalization", "x", "w")], the("weight")),
        ([node("LayerNormalization", "x", "x", "w")], the("bias")),
        ([node("RMSNormalization", "x", "w")], the("weight")),
        ([node("Mul", "w", "x")], the("weight")),
        ([node("Add", "w", "x")], the("bias")),
        ([node("Add", "x", "w", name="/layers.0/fc/Add_1")], the("bias", "layers.0.fc")),
        ([node("MatMul", "x", "w", name="MatMul")], the("weight", "", flipped=True)),
        ([node("MatMul", "w", "x")], None),
        ([node("Gemm", "w", "x")], None),
        ([node("Conv", "w", "x")], None),
        ([node("Sub", "x", "w")], None),
        ([node("Transpose", "w", out="v", perm=[0, 1]), node("MatMul", "x", "v")], None),
        ([node("Transpose", "w", out="v"), node("MatMul", "x", "v")], None),
    ],
)
def test_how_an_onnx_graph_uses_a_matrix(nodes: list[onnx.NodeProto], use: Use | None, tmp_path: Path) -> None:
    (read,) = onnx_constants.constants(saved(tmp_path / "m.onnx", nodes, {"w": numbers(3, 2).numpy()}))
    assert read.uses == ((use,) if use else ()) and read.shape == (3, 2)
    passed_on = [n.output[0] for n in nodes if n.op_type in ("Cast", "Identity")]
    assert read.names == ("w", *passed_on)


def test_tensors_of_an_onnx_graph_are_read_as_float32_wherever_they_stand(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "w": np.array([[0.5, 3.0]], np.float16),
        "d": np.array([[1.25], [7.0]], np.float64),
        "f": np.array([4.0], np.float32),
    }
    left_out: dict[str, np.ndarray] = {
        "i": np.array([1, 2], np.int64),
        "b": np.array([True]),
        "scalar": np.array(3.0, np.float32),
    }
    brain = helper.make_tensor("", TensorProto.BFLOAT16, [2], [1.5, -2.0])
    nodes = [
        node("Constant", out="c", value=brain),
        node("Constant", out="t", value_float=3.0),
        node("Add", "x", "c"),
        helper.make_node("Odd", ["x"], ["z"], value=numpy_helper.from_array(np.array([9.0], np.float32), "odd")),
    ]
    read = onnx_constants.constants(saved(tmp_path / "m.onnx", nodes, {**tensors, **left_out}))
    values = {one.names[0]: one.read() for one in read}
    assert {name: value.tolist() for name, value in values.items()} == {
        "w": [[0.5, 3.0]],
        "d": [[1.25], [7.0]],
        "f": [4.0],
        "c": [1.5, -2.0],
    }
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert [one.uses for one in read if one.names[0] == "c"] == [(the("bias"),)]


@pytest.mark.parametrize("kind", ["DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "QLinearMatMul"])
def test_a_quantized_onnx_graph_is_named_with_its_operator(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [node(kind, "x", "w")], {"w": numbers(3, 2).numpy()})
    with pytest.raises(CheckpointError, match=rf"m\.onnx: its weights are quantized \({kind}\)"):
        onnx_constants.constants(path)


@pytest.mark.parametrize("place", ["w.data", "inner/w.data", "../w.data", "link.data", "none.data", "folder", "", None])
def test_external_data_lies_in_a_plain_file_beside_the_graph(place: str | None, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "here", tmp_path / "here" / "inner", tmp_path / "here" / "folder"):
        folder.mkdir(exist_ok=True)
        (folder / "w.data").write_bytes(np.array([5.0, 6.0], np.float32).tobytes())
    (tmp_path / "here" / "link.data").symlink_to("w.data")
    path = saved(tmp_path / "here" / "m.onnx", [node("Add", "x", "w")], {"w": np.array([0, 0], np.float32)})
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", place), ("length", "8")):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    if place == "w.data":
        assert onnx_constants.constants(path)[0].read().tolist() == [5.0, 6.0]
        return
    with pytest.raises(CheckpointError, match=rf"reads weights from {place or ''!r}, which is no file beside it"):
        onnx_constants.constants(path)
