"""Writes a component of a TensorRT bundle: graphs, embedding tables, and engines for the targets built here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters.onnx.graph import signature
from edgeomni.exporters.onnx.llm import table_file, table_in
from edgeomni.exporters.onnx.weights import PARTS
from edgeomni.exporters.tensorrt.made import Made
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.tensorrt_builder import Recipe, Say, build_engine
from edgeomni.tensorrt_targets import built_anywhere

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_log = logging.getLogger("edgeomni")


def made(
    model: OmniModel,
    component: str,
    precision: str,
    options: TensorRtOptions,
    inputs: Mapping[str, float] | None = None,
) -> Made:
    """What the builder of `component` makes of `model`; `inputs` as measured before (input_ranges.input_scales)."""
    result: Made = import_module(f".{component}", __package__).make(model, precision, options, inputs)
    return result


def write(
    model: OmniModel,
    component: str,
    directory: Path,
    root: Path,
    precision: str,
    options: TensorRtOptions,
    progress: Say,
) -> Component:
    """The component under `directory`; paths in it are relative to `root`."""
    parts = made(model, component, precision, options)
    paths, files = dict[str, Path](), list[Path]()
    for role, graph in parts.graphs.items():
        written = graph.save(directory / f"{role}.onnx")
        paths[role] = written[0]
        files += written
    meta = {**parts.meta, "targets": list(options.targets)}
    meta["recipes"] = {role: asdict(recipe) for role, recipe in parts.recipes.items()}
    if component == "llm":
        meta["tables"], tables = _tables(model, parts, paths, root)
        files += tables
    parts.graphs.clear()  # their weights are on disk, and building engines takes memory
    meta["engines"], engines = _engines(paths, parts.recipes, root, options, progress)
    return Component(
        name=component,
        engine="tensorrt",
        format="tensorrt",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in parts.schemes.items()},
        graphs={role: GraphEntry(p.relative_to(root).as_posix(), *signature(p)) for role, p in paths.items()},
        meta=meta,
        files=describe_files(root, [*files, *engines]),
    )


def _tables(
    model: OmniModel, parts: Made, paths: dict[str, Path], root: Path
) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Where the embedding's rows are: in a head's data where both share them, else in a file of their own."""
    from edgeomni.exporters.tensorrt.llm import table_rows

    tables, files = dict[str, dict[str, Any]](), list[Path]()
    for part in PARTS:
        rows, shared = table_rows(model, part, parts.schemes)
        head = paths[f"{part}_head"]
        table = table_in(head, f"{part}_head", rows) if shared else None
        if table is None:
            table, path = table_file(head.with_name(f"embedding_{part}.bin"), rows)
            files.append(path)
        tables[part] = {**table, "file": (head.parent / table["file"]).relative_to(root).as_posix()}
    return tables, files


def _engines(
    paths: dict[str, Path], recipes: dict[str, Recipe], root: Path, options: TensorRtOptions, progress: Say
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Builds one engine per graph for all targets that can be built for here."""
    here = built_anywhere(options.targets)
    entries, files = list[dict[str, Any]](), list[Path]()
    for role, path in paths.items() if here else ():
        engine = path.with_name(f"{role}.{'-'.join(here)}.engine")
        built = build_engine(path, engine, recipes[role], here, progress=progress)
        _log.info("built %s in %.0f s with %.1f GB", engine.name, built.seconds, built.peak_bytes / 1e9)
        entry = {"role": role, "path": engine.relative_to(root).as_posix(), "targets": list(here)}
        entries.append({**entry, "package": built.package, "version": built.version})
        files.append(engine)
    return entries, files
