"""Codec decoder -> OpenVINO: the streaming graph of the ONNX format's portable flavour, read and written by OpenVINO.

Inputs, outputs and states are those of exporters/onnx/codec.py; the constants keep their names and their bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx import codec as onnx_codec
from edgeomni.exporters.openvino import files
from edgeomni.exporters.openvino.options import OpenVinoOptions
from edgeomni.exporters.openvino.precisions import schemes_for
from edgeomni.model.codec_reader import read_plan
from edgeomni.openvino_library import ov

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

FLAVOUR = "portable"


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OpenVinoOptions) -> Component:
    """Writes out_dir/codec.xml and its .bin; what a runtime needs to know of it goes into the component's meta."""
    scheme = schemes_for("codec", precision, options)["codec"]
    graph, meta = onnx_codec.build(read_plan(model.codec, model.spec.codec), FLAVOUR, half=scheme.kind == "fp16")
    with tempfile.TemporaryDirectory(prefix="edgeomni-") as scratch:
        built = ov.Core().read_model(graph.save(Path(scratch) / "codec.onnx")[0])
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
