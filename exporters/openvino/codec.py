"""Codec decoder -> OpenVINO: the streaming graph of the ONNX format's portable flavour, read and written by OpenVINO.

Inputs, outputs and states are those of exporters/onnx/codec.py; the constants keep their names and their bytes.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx import codec as onnx_codec
from edgeomni.exporters.onnx import sine
from edgeomni.exporters.onnx.graph import Graph
from edgeomni.exporters.onnx.operators import PortableOperators
from edgeomni.exporters.openvino import files
from edgeomni.exporters.openvino.options import OpenVinoOptions
from edgeomni.exporters.openvino.precisions import schemes_for
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import read_plan
from edgeomni.openvino_library import ov

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


class SineByPolynomial(PortableOperators):
    """Standard operators, but the snakes' sine is a polynomial: OpenVINO's own Sin is a plain loop of one thread.

    Round stands where exporters/onnx/sine.py adds and subtracts a constant, which OpenVINO would take for nothing.
    """

    snake_period = math.pi
    snake_gain = sine.LEAD**2

    def snake(self, u: str) -> str:
        g, root = self.graph, sine.monic_sine(self.graph, u, by_round=True)
        linear = g.op("Mul", [u, g.floats("snake.linear", math.pi / self.snake_gain)])
        return g.op("Add", [linear, g.op("Mul", [root, root])])


def build(plan: CodecPlan, *, half: bool) -> tuple[Graph, dict[str, Any]]:
    """The streaming graph in ONNX, and what a runtime must feed to it."""
    operators = SineByPolynomial(Graph("codec", onnx_codec.OPSET))
    return onnx_codec.build(plan, "portable", half=half, operators=operators)


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OpenVinoOptions) -> Component:
    """Writes out_dir/codec.xml and its .bin; what a runtime needs to know of it goes into the component's meta."""
    scheme = schemes_for("codec", precision, options)["codec"]
    graph, meta = build(read_plan(model.codec, model.spec.codec), half=scheme.kind == "fp16")
    with tempfile.TemporaryDirectory(prefix="edgeomni-") as scratch:
        built = ov.Core().read_model(graph.save(Path(scratch) / "codec.onnx")[0])
        for value in built.outputs:  # else a layer's own name stands beside ours
            value.get_tensor().set_names({n for n in value.get_names() if n == "wave" or n.startswith("next.")})
        written = files.save(built, out_dir / "codec.xml")
    return Component(
        name="codec",
        engine="openvino",
        format="openvino",
        precision=precision,
        scheme={"codec": str(scheme)},
        graphs={"codec": GraphEntry(written[0].relative_to(root).as_posix(), *files.signature(built))},
        meta=meta,
        files=describe_files(root, written),
    )
