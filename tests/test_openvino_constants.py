"""The constants of graphs in OpenVINO's format, on small files written here by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeomni.errors import CheckpointError
from edgeomni.model.graph_weights import Use
from edgeomni.model.openvino_constants import constants

WEIGHT, TURNED, BIAS = Use("fc", "weight"), Use("fc", "weight", flipped=True), Use("fc", "bias")
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "f16": torch.Tensor.half,
    "bf16": torch.Tensor.bfloat16,
    "f32": torch.Tensor.float,
    "f64": torch.Tensor.double,
}


def ir(path: Path, layers: list[str], edges: list[tuple[int, int, int]]) -> Path:
    """`edges`: from layer, to layer, to port. The layers are numbered as they come."""
    numbered = "".join(text.replace("<layer", f'<layer id="{i}"', 1) for i, text in enumerate(layers))
    lines = "".join(f'<edge from-layer="{a}" from-port="0" to-layer="{b}" to-port="{p}"/>' for a, b, p in edges)
    path.write_text(f"<net><layers>{numbered}</layers><edges>{lines}</edges></net>")
    return path


def const(shape: str, offset: int, size: int, name: str = "self.fc.weight", kind: str = "f32") -> str:
    data = f'element_type="{kind}" shape="{shape}" offset="{offset}" size="{size}"'
    return f'<layer name="{name}" type="Const"><data {data}/></layer>'


def layer(kind: str, name: str = "__module.fc/aten::linear/X", data: str = "") -> str:
    return f'<layer name="{name}" type="{kind}">{data}</layer>'


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_an_openvino_graph_are_read_where_they_stand(kind: str, tmp_path: Path) -> None:
    tensor = KINDS[kind](torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    raw = tensor.view(torch.uint8).numpy().tobytes()
    (tmp_path / "m.bin").write_bytes(b"\xff" * 5 + raw)
    names = ("self.fc.weight_compressed", "self.fc.weight", "fc.weight")
    for name in names:
        path = ir(tmp_path / "m.xml", [const("2, 3", 5, len(raw), name, kind)], [])
        (read,) = constants(path)
        assert (read.names, read.shape) == (("fc.weight",), (2, 3))
        assert read.read().dtype == torch.float32 and torch.equal(read.read(), tensor.float())


@pytest.mark.parametrize(
    ("shape", "offset", "size", "said"),
    [
        ("2, 3", 0, 23, "has 23 bytes"),
        ("2, 3", 0, 25, "has 25 bytes"),
        ("2, 3", -1, 24, "has 24 bytes"),
        ("-2, -3", 0, 24, "has 24 bytes"),
        ("0, 3", 0, 0, "has 0 bytes"),
        ("2, 3", 1, 24, "truncated"),
        ("2, 3", 99, 24, "truncated"),
    ],
)
def test_numbers_outside_the_file_are_refused(shape: str, offset: int, size: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(bytes(24))
    (read,) = constants(ir(tmp_path / "m.xml", [const(shape, offset, size)], []))
    with pytest.raises(CheckpointError, match=rf"m\.bin: .*{said}"):
        read.read()


def test_what_is_no_matrix_of_floats_is_left_out_or_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(bytes(64))
    small = [const("", 0, 4), const("4", 0, 4, kind="i8"), const("2, 2", 0, 32, kind="i64"), const("1", 0, 4)]
    kept = constants(ir(tmp_path / "m.xml", small, []))
    assert [one.shape for one in kept] == [(1,)]
    for kind in ("i4", "u4", "i8", "u8", "nf4", "f8e4m3"):
        with pytest.raises(CheckpointError, match=rf"m\.xml: its weights are quantized \({kind}\)"):
            constants(ir(tmp_path / "m.xml", [*small, const("2, 2", 0, 4, kind=kind)], []))


@pytest.mark.parametrize("start", ["<!DOCTYPE net>", "<!-- --><!DOCTYPE net [<!ENTITY a 'b'>]>"])
def test_a_document_type_is_refused(start: str, tmp_path: Path) -> None:
    path = ir(tmp_path / "m.xml", [], [])
    assert constants(path) == []
    path.write_text(start + path.read_text())
    with pytest.raises(CheckpointError, match="document type"):
        constants(path)


def transposed(said: str) -> str:
    return f'<data transpose_a="false" transpose_b="{said}"/>'


@pytest.mark.parametrize(
    ("reader", "port", "use"),
    [
        (layer("MatMul", data=transposed("true")), 1, WEIGHT),
        (layer("MatMul", data=transposed("1")), 1, WEIGHT),
        (layer("MatMul", data=transposed("false")), 1, TURNED),
        (layer("MatMul", data="<data/>"), 1, TURNED),
        (layer("MatMul"), 1, TURNED),
        (layer("MatMul", data=transposed("true")), 0, None),
        (layer("Convolution"), 1, WEIGHT),
        (layer("Gather"), 0, WEIGHT),
        (layer("Multiply"), 0, WEIGHT),
        (layer("Add"), 1, BIAS),
        (layer("Add", name="__module.layers.0.fc/aten::add/Add"), 1, Use("layers.0.fc", "bias")),
        (layer("Add", name="Add_7"), 1, Use("Add_7", "bias")),
        (layer("Subtract"), 1, None),
    ],
)
@pytest.mark.parametrize("converted", [0, 1, 2])
def test_how_an_openvino_graph_uses_a_matrix(
    reader: str, port: int, use: Use | None, converted: int, tmp_path: Path
) -> None:
    """Directly, or through changes of precision."""
    layers = [const("2, 3", 0, 24), *[layer("Convert")] * converted, reader]
    last = len(layers) - 1
    edges = [(i, i + 1, port if i + 1 == last else 0) for i in range(last)]
    (read,) = constants(ir(tmp_path / "m.xml", layers, edges))
    assert read.uses == ((use,) if use else ())


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_a_bias_that_stands_behind_a_scale_is_divided_by_it(converted: bool, count: int, tmp_path: Path) -> None:
    """(x W + b) s, written as x W s + b s. A scale of more than one number is no scale of all."""
    (tmp_path / "m.bin").write_bytes(np.array([0.5, 0.5, 3.0, 4.0], np.float32).tobytes())
    shape = "1, 1" if count == 1 else "2"
    scale, bias = const(shape, 0, 4 * count, "s"), const("2", 8, 8, "b")
    layers = [scale, bias, layer("MatMul", "__module.q_proj/aten::linear/MatMul"), layer("Multiply", "__module.a/m")]
    layers += [layer("Add", "__module.a/add"), layer("Convert", "c")]
    edges = [(0, 5, 0), (5, 3, 1)] if converted else [(0, 3, 1)]
    path = ir(tmp_path / "m.xml", layers, [*edges, (2, 3, 0), (3, 4, 0), (1, 4, 1)])
    read = constants(path)
    scaled = [one for one in read if Use("q_proj", "bias") in one.uses]
    assert [one.names for one in read if one.names] == [("s",), ("b",)] and len(read) == 3 - (count == 2)
    assert [one.read().tolist() for one in scaled] == ([[6.0, 8.0]] if count == 1 else [])
    assert [(one.names, one.shape) for one in scaled] == ([((), (2,))] if count == 1 else [])
