"""The LLM -> OpenVINO: body, TTS adapter where there is one, text head, audio head, and where embedding rows lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.body import DecoderStack, rope_of
from edgeomni.exporters.onnx.weights import PARTS, PackedWeights, Part, embedding_rows, head_rows
from edgeomni.exporters.openvino import fast, files
from edgeomni.exporters.openvino.body import build
from edgeomni.exporters.openvino.graph import Graph, stored_codes
from edgeomni.exporters.openvino.options import OpenVinoOptions
from edgeomni.exporters.openvino.precisions import fitted, schemes_for
from edgeomni.quantize.schemes import Packed, Scheme, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_DTYPES = {"f32": "float", "f16": "float16", "i8": "int8", "i4": "int4"}


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: OpenVinoOptions) -> Component:
    """Writes body.xml, [tts.xml,] text_head.xml, audio_head.xml with their .bin files into `out_dir`.

    The component's meta says: "context", how many frames its rotary caches cover; "tables", where the rows of the
    embedding lie.
    """
    schemes = fitted(schemes_for("llm", precision, options), model.spec)
    models = {stack.name: build(stack).model() for stack in _stacks(model, schemes)}
    written = {role: files.save(built, out_dir / f"{role}.xml") for role, built in models.items()}
    tables: dict[str, Any] = {}
    for part in PARTS:
        role = f"{part}_head"
        models[role] = _head(role, quantize(head_rows(model, part), schemes[role]))
        written[role] = files.save(models[role], out_dir / f"{role}.xml")
        table, more = _table(model, part, schemes, written[role][0])
        tables[part] = {**table, "file": (out_dir / table["file"]).relative_to(root).as_posix()}
        written[role] += more
    return Component(
        name="llm",
        engine="openvino",
        format="openvino",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items() if group in _used(model)},
        graphs={
            role: GraphEntry(written[role][0].relative_to(root).as_posix(), *files.signature(built))
            for role, built in models.items()
        },
        meta={"context": model.spec.context, "tables": tables, **fast.meta(options.fast, schemes)},
        files=describe_files(root, [path for paths in written.values() for path in paths]),
    )


def _used(model: OmniModel) -> set[str]:
    groups = {"body.linear", "text_head", "audio_head"}
    if model.spec.tts_layers:
        groups |= {"tts.linear", "embedding"}
    return groups if model.spec.tied else groups | {"embedding"}


def _stacks(model: OmniModel, schemes: Mapping[str, Scheme]) -> list[DecoderStack]:
    spec, weights, rope = model.spec, PackedWeights.of(model, schemes), rope_of(model)
    stacks = [DecoderStack("body", spec.body.layers, spec.body, rope, weights, every_position=bool(spec.tts_layers))]
    if spec.tts_layers:
        stacks.append(DecoderStack("tts", spec.tts_layers, spec.body, rope, weights))
    return stacks


def _head(role: str, rows: Packed) -> Any:
    """hidden float [1, 1, D] -> logits float [1, 1, rows]."""
    graph = Graph(role)
    hidden = graph.input("hidden", np.float32, [1, 1, rows.k])
    graph.output("logits", graph.linear(hidden, role, rows))
    return graph.model()


def _table(
    model: OmniModel, part: Part, schemes: Mapping[str, Scheme], head: Path
) -> tuple[dict[str, Any], list[Path]]:
    """The table of a part's embedding rows: in the head's file where they are the head's, else in one of its own."""
    tied = model.spec.tied and not (part == "audio" and model.spec.tts_layers)
    scheme = schemes[f"{part}_head" if tied else "embedding"]
    rows = quantize(embedding_rows(model, part), scheme)
    path = head.with_suffix(".bin") if tied else head.with_name(f"embedding_{part}.bin")
    places = _places_in(head, f"{part}_head") if tied else _written(path, rows)
    table = {"file": path.name, "rows": len(rows.data), "width": rows.k, "scheme": str(scheme), "codes": places[0]}
    if len(places) > 1:
        table["scales"] = places[1]
    return table, [] if tied else [path]


def _places_in(head: Path, name: str) -> list[dict[str, Any]]:
    """Where a head's weight, or its codes and scales, lie in its .bin file."""
    found = {constant.name: constant for constant in files.constants(head)}
    names = [f"{name}.weight"] if f"{name}.weight" in found else [f"{name}.codes", f"{name}.scales"]
    return [{"offset": c.offset, "dtype": _DTYPES[c.dtype], "shape": list(c.shape)} for c in (found[n] for n in names)]


def _written(path: Path, rows: Packed) -> list[dict[str, Any]]:
    """Writes rows that no head shares into a file of their own, codes first."""
    if rows.scales is None:
        path.write_bytes(rows.data.tobytes())
        return [{"offset": 0, "dtype": _DTYPES[f"f{8 * rows.data.itemsize}"], "shape": list(rows.data.shape)}]
    codes = stored_codes(rows)
    path.write_bytes(codes.tobytes() + rows.scales.tobytes())
    return [
        {"offset": 0, "dtype": f"int{int(rows.scheme.bits)}", "shape": [len(rows.data), rows.k]},
        {"offset": codes.nbytes, "dtype": "float", "shape": list(rows.scales.shape)},
    ]
