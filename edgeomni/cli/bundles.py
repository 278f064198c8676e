"""`edgeomni inspect`. All text of a bundle goes through `plain`, so that it is shown and commands nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bundle import Bundle, Port, is_bundle
from ..engines import COMPONENTS
from ..errors import BundleError
from ..printing import say, show
from ..shipped import found
from . import checkpoint
from .common import console
from .legend import figures, legend, verdict
from .terminal import plain, visible

GATE = "gate"

_INDEX = re.compile(r"(\.\d+(x\d+)?)+\b")
"""The numbers in names like past_key.0 and tail.64x1."""


@click.command("inspect")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON object.")
def inspect_(source: str, as_json: bool) -> None:
    """Show what SOURCE holds: a bundle, or a checkpoint of any kind.

    Of a bundle: precisions, size and the gate's verdict, then components, the gate's figures with a legend, I/O,
    provenance and licences. Of a checkpoint: kind, whether it is trained, sizes and parameters, read without torch.
    """
    out = console()
    path = Path(found(source, "bundle"))
    if not path.exists():
        raise BundleError(f"{source}: no such bundle or checkpoint directory; check the path")
    if not is_bundle(path):
        _show_checkpoint(checkpoint.read(path), out, as_json)
        return
    opened = Bundle.open(path, hashes=False)
    if as_json:
        click.echo(json.dumps(describe(opened), sort_keys=True))
        return
    for line in heading(opened):
        say(out, visible(line))
    for table in tables(opened):
        say(out)
        show(out, table)
        if table.title == GATE:
            for line in legend(opened.manifest.gate):
                say(out, visible(line))


def _show_checkpoint(found: checkpoint.Checkpoint, out: Console, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.to_dict(), sort_keys=True))
        return
    for line in checkpoint.lines(found):
        say(out, visible(line))
    parts = Table("part", "what it is", title="sizes")
    for name, words in found.sizes.items():
        parts.add_row(plain(name), plain(words))
    counts = Table("part", title="parameters")
    counts.add_column("millions", justify="right")
    for name, count in found.parameters.items():
        counts.add_row(plain(name), f"{count / 1e6:.3f}")
    files = Table("file", title="files")
    files.add_column("MB", justify="right")
    for name, size in found.files.items():
        files.add_row(plain(name), f"{size / 1e6:.2f}")
    facts = _pairs("provenance", found.provenance), _pairs("licences", found.licences)
    for table in (parts, counts, *facts, files):
        if table.row_count:
            say(out)
            show(out, table)


def describe(bundle: Bundle) -> dict[str, Any]:
    return {**bundle.manifest.to_dict(), "size": bundle.size, "digest": bundle.digest}


def heading(bundle: Bundle) -> Iterator[str]:
    """What a user asks first: how large, how precise, and whether the gate passed."""
    parts = bundle.manifest.components
    yield f"{bundle.path}: bundle, {bundle.size / 1e6:.2f} MB"
    yield "precision: " + ", ".join(f"{name} {parts[name].precision}" for name in COMPONENTS)
    yield verdict(bundle.manifest.gate)


def tables(bundle: Bundle) -> Iterator[Table]:
    yield _components(bundle)
    yield gate_table(bundle.manifest.gate)
    yield _graphs(bundle)
    yield _pairs("provenance", {**bundle.manifest.provenance, "digest": bundle.digest})
    yield _pairs("licences", bundle.manifest.licences)


def _components(bundle: Bundle) -> Table:
    table = Table("component", "engine", "format", "precision", "stored as", title="components")
    table.add_column("MB", justify="right")
    for part in bundle.exports():
        own = bundle.manifest.components[part.name] is part
        name = part.name if own else f"{part.name} (alternative)"
        stored = Text("\n").join(plain(line) for line in _stored(part.scheme))
        size = sum(f.size for f in part.files) / 1e6
        table.add_row(*map(plain, (name, part.engine, part.format, part.precision)), stored, f"{size:.2f}")
    table.add_row("total", "", "", "", "", f"{bundle.size / 1e6:.2f}")
    return table


def _stored(scheme: dict[str, str]) -> list[str]:
    """One line for each group of tensors, and one for all single tensors that a mixture stores in another scheme."""
    single = Counter(kind for name, kind in scheme.items() if name.endswith(".weight"))
    groups = [f"{name} {kind}" for name, kind in scheme.items() if not name.endswith(".weight")]
    return groups + [f"{count} tensors {kind}" for kind, count in single.items()]


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
    table = Table("figure", "part", "value", "wanted", "verdict", title=GATE)
    for part, name, entry in figures(gate):
        limits = [f"{k.replace('_', ' ')} {_number(v)}" for k, v in entry.items() if _is_limit(k, v)]
        cells = name, part, _number(entry.get("value", "")), ", ".join(limits), entry.get("verdict", "")
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
