"""The LLM -> ONNX: body, TTS adapter where there is one, text head, audio head, and where embedding rows are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.body import DecoderStack, build, rope_of
from edgeomni.exporters.onnx.graph import FLOAT, Graph, signature
from edgeomni.exporters.onnx.operators import operators_for
from edgeomni.exporters.onnx.options import Flavour, OnnxOptions
from edgeomni.exporters.onnx.precisions import schemes_for
from edgeomni.exporters.onnx.weights import PARTS, PackedWeights, embedding_rows, head_rows
from edgeomni.quantize.schemes import Packed, Scheme, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_PAGE = 4096


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OnnxOptions) -> Component:
    """Writes body.onnx, [tts.onnx,] text_head.onnx, audio_head.onnx with their data into `out_dir`.

    The component's meta says: "attention" ("gqa" or "scatter"), which inputs the body has (attention.py); "context",
    how many frames its rotary caches cover; "tables", where the rows of the embedding lie.
    """
    schemes = schemes_for("llm", precision, options)
    graphs, files, attention = _stacks(model, schemes, options.flavour, out_dir)
    tables: dict[str, Any] = {}
    for part in PARTS:
        rows = quantize(head_rows(model, part), schemes[f"{part}_head"])
        written = _head(f"{part}_head", rows, options.flavour).save(out_dir / f"{part}_head.onnx")
        graphs[f"{part}_head"] = written[0]
        tied = model.spec.tied and not (part == "audio" and model.spec.tts_layers)
        table = table_in(written[0], f"{part}_head", rows) if tied else None
        if table is None:
            rows = quantize(embedding_rows(model, part), schemes["embedding"])
            table, path = table_file(out_dir / f"embedding_{part}.bin", rows)
            written.append(path)
        tables[part] = {**table, "file": (out_dir / table["file"]).relative_to(root).as_posix()}
        files += written
    return Component(
        name="llm",
        engine="onnxruntime",
        format="onnx",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items() if group in _used(model)},
        graphs={role: GraphEntry(p.relative_to(root).as_posix(), *signature(p)) for role, p in graphs.items()},
        meta={"flavour": options.flavour, "attention": attention, "context": model.spec.context, "tables": tables},
        files=describe_files(root, files),
    )


def _used(model: OmniModel) -> set[str]:
    groups = {"body.linear", "text_head", "audio_head"}
    if model.spec.tts_layers:
        groups |= {"tts.linear", "embedding"}
    return groups if model.spec.tied else groups | {"embedding"}


def _stacks(
    model: OmniModel, schemes: Mapping[str, Scheme], flavour: Flavour, out_dir: Path
) -> tuple[dict[str, Path], list[Path], str]:
    """Writes body and TTS adapter; returns graph paths by role, all files, and the kind of attention."""
    spec, weights, rope = model.spec, PackedWeights.of(model, schemes), rope_of(model)
    stacks = [DecoderStack("body", spec.body.layers, spec.body, rope, weights, every_position=bool(spec.tts_layers))]
    if spec.tts_layers:
        stacks.append(DecoderStack("tts", spec.tts_layers, spec.body, rope, weights))
    graphs: dict[str, Path] = {}
    files: list[Path] = []
    attention = ""
    for stack in stacks:
        graph, attention = build(stack, flavour)
        written = graph.save(out_dir / f"{stack.name}.onnx")
        graphs[stack.name] = written[0]
        files += written
    return graphs, files, attention


def _head(name: str, rows: Packed, flavour: Flavour) -> Graph:
    """hidden float [1, 1, D] -> logits float [1, 1, rows]."""
    operators = operators_for(flavour, name)
    g = operators.graph
    hidden = g.input("hidden", FLOAT, [1, 1, rows.k])
    g.output("logits", FLOAT, [1, 1, len(rows.data)], operators.rows_linear(hidden, name, rows))
    return g


def table_in(path: Path, name: str, rows: Packed) -> dict[str, Any] | None:
    """Where a head's rows lie in its external data file; None where the head is too small to have one."""
    tensors = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    parts = [f"{name}.codes", f"{name}.scales"] if rows.scales is not None else [f"{name}.codes"]
    if any(tensors[p].data_location != onnx.TensorProto.EXTERNAL for p in parts):
        return None
    places = []
    for part in parts:
        entries = {e.key: e.value for e in tensors[part].external_data}
        places.append(
            {
                "offset": int(entries["offset"]),
                "dtype": onnx.TensorProto.DataType.Name(tensors[part].data_type).lower(),
                "shape": list(tensors[part].dims),
            }
        )
        location = entries["location"]
    return _table(location, rows, places)


def table_file(path: Path, rows: Packed) -> tuple[dict[str, Any], Path]:
    """Writes rows that no head shares into a file of their own."""
    arrays = [rows.data] if rows.scales is None else [rows.data, rows.scales]
    places, offset = [], 0
    with path.open("wb") as f:
        for array in arrays:
            offset += f.write(b"\0" * (-offset % _PAGE))
            dtype = (
                "bfloat16"
                if rows.scheme.kind == "bf16"
                else {"float32": "float"}.get(str(array.dtype), str(array.dtype))
            )
            places.append({"offset": offset, "dtype": dtype, "shape": list(array.shape)})
            offset += f.write(np.ascontiguousarray(array).data)
    return _table(path.name, rows, places), path


def _table(file: str, rows: Packed, places: list[dict[str, Any]]) -> dict[str, Any]:
    """dtype of the codes: float, float16, uint8 (around the middle one, as schemes.Packed), int8 or int4 (around 0)."""
    table = {"file": file, "rows": len(rows.data), "width": rows.k, "scheme": str(rows.scheme), "codes": places[0]}
    return {**table, "scales": places[1]} if len(places) > 1 else table
