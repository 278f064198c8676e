"""`edgeomni inspect`. All text of a bundle goes through `plain`, so that it is shown and commands nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..bundle import Bundle, Port
from ..engines import COMPONENTS
from .common import console
from .terminal import plain

_INDEX = re.compile(r"(\.\d+(x\d+)?)+\b")
"""The numbers in names like past_key.0 and tail.64x1."""


@click.command("inspect")
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON, with size and digest.")
def inspect_(bundle: str, as_json: bool) -> None:
    """Show what BUNDLE holds: components, engines, precisions, sizes, I/O, gate figures, provenance, licences."""
    opened = Bundle.open(bundle, hashes=False)
    if as_json:
        click.echo(json.dumps(describe(opened), sort_keys=True))
        return
    out = console()
    for table in tables(opened):
        out.print(table)


def describe(bundle: Bundle) -> dict[str, Any]:
    return {**bundle.manifest.to_dict(), "size": bundle.size, "digest": bundle.digest}


def tables(bundle: Bundle) -> Iterator[Table]:
    yield _components(bundle)
    yield _graphs(bundle)
    yield gate_table(bundle.manifest.gate)
    yield _pairs("provenance", {**bundle.manifest.provenance, "digest": bundle.digest})
    yield _pairs("licences", bundle.manifest.licences)


def _components(bundle: Bundle) -> Table:
    table = Table("component", "engine", "format", "precision", "stored as", title=plain(bundle.path))
    table.add_column("MB", justify="right")
    for name in COMPONENTS:
        part = bundle.manifest.components[name]
        stored = ", ".join(f"{group} {scheme}" for group, scheme in part.scheme.items())
        size = sum(f.size for f in part.files) / 1e6
        cells = name, part.engine, part.format, part.precision, stored, f"{size:.2f}"
        table.add_row(*map(plain, cells))
    table.add_row("total", "", "", "", "", f"{bundle.size / 1e6:.2f}")
    return table


def _graphs(bundle: Bundle) -> Table:
    table = Table("graph", "file", "inputs", "outputs", title="I/O")
    for name in COMPONENTS:
        part = bundle.manifest.components[name]
        for role, graph in part.graphs.items():
            table.add_row(
                plain(f"{name}/{role}"), plain(graph.path), _signature(graph.inputs), _signature(graph.outputs)
            )
    return table


def _signature(ports: list[Port]) -> Text:
    """One line per input or output; past_key.0, past_key.1, ... are shown once."""
    shown: dict[str, set[str]] = {}
    for port in ports:
        shown.setdefault(_INDEX.sub(".*", port.name), set()).add(f"{port.dtype} {port.shape}".replace("'", ""))
    lines = [plain(f"{name} {s.pop() if len(s) == 1 else '(several shapes)'}") for name, s in shown.items()]
    return Text("\n").join(lines)


def gate_table(gate: dict[str, Any]) -> Table:
    """The gate's figures as bundle.json holds them; entries of another form are left out."""
    table = Table("part", "figure", "value", "wanted", "", title="gate")
    for part in ("fidelity", "quality", "device"):
        figures = gate.get(part)
        for name, entry in figures.items() if isinstance(figures, dict) else ():
            if isinstance(entry, dict):
                limits = [f"{k.replace('_', ' ')} {_number(v)}" for k, v in entry.items() if _is_limit(k, v)]
                cells = part, name, _number(entry.get("value", "")), ", ".join(limits), entry.get("verdict", "")
                table.add_row(*map(plain, cells))
    return table


def _is_limit(key: str, value: Any) -> bool:
    return key.startswith("at_") and value is not None


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _pairs(title: str, data: dict[str, Any]) -> Table:
    table = Table("", "", title=title, show_header=False)
    for key, value in _flat(data):
        table.add_row(plain(key), plain(value))
    return table


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _number(value)
