"""The LLM -> ONNX: body, TTS adapter where there is one, text head, audio head, and where embedding rows are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.attention import Rope
from edgeomni.exporters.onnx.body import Stack, Weights, build
from edgeomni.exporters.onnx.graph import FLOAT, Graph, signature
from edgeomni.exporters.onnx.kernels import rows_linear
from edgeomni.quantize.policy import schemes_for
from edgeomni.quantize.schemes import Packed, Scheme, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_PAGE = 4096


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, flavour: str, block: int | None) -> Component:
    """Writes body.onnx, [tts.onnx,] text_head.onnx, audio_head.onnx with their data into `out_dir`.

    meta: "attention" ("gqa" or "scatter") says which inputs the body has (onnx_attention.py), "context" the frames
    that its rotary caches cover, "tables" where the embedding's rows lie. Raises ExportError for biases that
    only some of a packed group have.
    """
    schemes = schemes_for("llm", precision, block, signed=flavour == "portable")
    graphs, files, attention = _stacks(model, schemes, flavour, out_dir)
    tables: dict[str, Any] = {}
    for part in ("text", "audio"):
        rows = quantize(_rows(model, part), schemes[f"{part}_head"])
        written = _head(f"{part}_head", rows, flavour).save(out_dir / f"{part}_head.onnx")
        graphs[f"{part}_head"] = written[0]
        tied = model.spec.tied and not (part == "audio" and model.spec.tts_layers)
        table = _table_in(written[0], f"{part}_head", rows) if tied else None
        if table is None:
            rows = quantize(_embedding_rows(model, part), schemes["embedding"])
            table, path = _table_file(out_dir / f"embedding_{part}.bin", rows)
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
        meta={"flavour": flavour, "attention": attention, "context": model.spec.context, "tables": tables},
        files=describe_files(root, files),
    )


def _used(model: OmniModel) -> set[str]:
    groups = {"body.linear", "text_head", "audio_head"}
    if model.spec.tts_layers:
        groups |= {"tts.linear", "embedding"}
    return groups if model.spec.tied else groups | {"embedding"}


def _stacks(
    model: OmniModel, schemes: Mapping[str, Scheme], flavour: str, out_dir: Path
) -> tuple[dict[str, Path], list[Path], str]:
    """Writes body and TTS adapter; returns graph paths by role, all files, and the kind of attention."""
    spec, weights = model.spec, Weights(model, schemes)
    rotary = model.body.rotary_emb
    rope = Rope.of(rotary.inv_freq.float().cpu().numpy(), float(rotary.attention_scaling), spec.context)
    stacks = [Stack("body", spec.body.layers, spec.body, rope, weights, every_position=bool(spec.tts_layers))]
    if spec.tts_layers:
        stacks.append(Stack("tts", spec.tts_layers, spec.body, rope, weights))
    graphs: dict[str, Path] = {}
    files: list[Path] = []
    attention = ""
    for stack in stacks:
        graph, attention = build(stack, flavour)
        written = graph.save(out_dir / f"{stack.name}.onnx")
        graphs[stack.name] = written[0]
        files += written
    return graphs, files, attention


def _rows(model: OmniModel, part: str) -> Any:
    rows = model.text_rows() if part == "text" else model.audio_rows()
    return rows.detach().cpu().float().numpy()


def _embedding_rows(model: OmniModel, part: str) -> Any:
    split = model.spec.layout.text_vocab
    rows = model.embedding.weight[:split] if part == "text" else model.embedding.weight[split:]
    return rows.detach().cpu().float().numpy()


def _head(name: str, rows: Packed, flavour: str) -> Graph:
    """hidden float [1, 1, D] -> logits float [1, 1, rows]."""
    g = Graph(name, opset=21 if flavour == "ort" else 24)
    hidden = g.input("hidden", FLOAT, [1, 1, rows.k])
    logits = rows_linear(g, hidden, name, rows, portable=flavour != "ort")
    g.output("logits", FLOAT, [1, 1, len(rows.data)], logits)
    return g


def _table_in(path: Path, name: str, rows: Packed) -> dict[str, Any] | None:
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


def _table_file(path: Path, rows: Packed) -> tuple[dict[str, Any], Path]:
    """Writes rows that no head shares into a file of their own."""
    arrays = [rows.data] if rows.scales is None else [rows.data, rows.scales]
    places, offset = [], 0
    with path.open("wb") as f:
        for array in arrays:
            offset += f.write(b"\0" * (-offset % _PAGE))
            dtype = {"float32": "float"}.get(str(array.dtype), str(array.dtype))
            places.append({"offset": offset, "dtype": dtype, "shape": list(array.shape)})
            offset += f.write(np.ascontiguousarray(array).data)
    return _table(path.name, rows, places), path


def _table(file: str, rows: Packed, places: list[dict[str, Any]]) -> dict[str, Any]:
    """dtype of the codes: float, float16, uint8 (around the middle one, as schemes.Packed), int8 or int4 (around 0)."""
    table = {"file": file, "rows": len(rows.data), "width": rows.k, "scheme": str(rows.scheme), "codes": places[0]}
    return {**table, "scales": places[1]} if len(places) > 1 else table
