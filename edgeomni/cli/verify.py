"""`edgeomni verify`: is the bundle as its exporter wrote it, and can its graphs be opened at all?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from ..bundle import Bundle
from ..errors import BundleError, GateError
from .bundles import gate_table
from .common import console
from .opening import NOT_HERE, open_apart
from .terminal import visible


@click.command("verify")
@click.argument("bundle")
@click.option("--load", is_flag=True, help="Open each graph too, in a process of its own, which may crash.")
@click.option("--gate", is_flag=True, help="Replay what the export gave when it was judged, and compare (exit 3).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also for a failure.")
def verify_(bundle: str, load: bool, gate: bool, as_json: bool) -> None:
    """Check every file of BUNDLE against its recorded SHA-256 (exit 1 where one differs).

    Hashes show that the files are as the exporter wrote them. They do not show who the exporter was, nor that the
    graphs are harmless: a graph from a stranger can crash the engine that opens it, which --load tries safely.
    --gate needs no torch. It shows whether this machine's engine chooses as the one did that judged the bundle.
    """
    report: dict[str, Any] = {"bundle": bundle}
    try:
        _verify(bundle, load, report)
        if gate:
            _replay(bundle, report, quiet=as_json)
    except (BundleError, GateError) as exc:
        if as_json:
            click.echo(json.dumps({**report, "passed": False, "error": str(exc)}))
        raise
    click.echo(json.dumps({**report, "passed": True}) if as_json else _text(report))


def _verify(path: str, load: bool, report: dict[str, Any]) -> None:
    """Fills `report` as far as the checks come. Raises BundleError for the first kind of fault found."""
    bundle = Bundle.open(path, hashes=True)
    report |= {"files": len(bundle.entries()), "bytes": bundle.size, "digest": bundle.digest}
    if load:
        report["graphs"] = {}
        for name, fault in _opened(bundle):
            report["graphs"][name] = fault or "opened"
        if failed := {name: fault for name, fault in report["graphs"].items() if fault != "opened"}:
            raise BundleError(_not_opened(path, failed))


def _not_opened(path: str, failed: dict[str, str]) -> str:
    """What happened to the graphs that did not open, each reason once, and what to make of it."""
    graphs: dict[str, list[str]] = {}
    for name, fault in failed.items():
        graphs.setdefault(fault, []).append(name)
    faults = "; ".join(f"{', '.join(names)} {fault}" for fault, names in graphs.items())
    here = all(fault.startswith(NOT_HERE) for fault in failed.values())
    advice = "Nothing else is known against them" if here else "Do not run this bundle; export the checkpoint again"
    return f"{path}: its files are as recorded, but of its graphs {len(failed)} could not be opened: {faults}. {advice}"


def _replay(path: str, report: dict[str, Any], quiet: bool) -> None:
    """Raises GateError where this machine chooses otherwise than the one that judged the bundle."""
    from ..gate.run import replayed
    from ..runtimes import open_components

    bundle = Bundle.open(path)
    verdict = replayed(bundle, open_components(bundle))
    report["gate"] = verdict.to_dict()
    if not quiet:
        console().print(gate_table(report["gate"]))
    then, now = (_versions(verdict.details["engines"][when]) for when in ("then", "now"))
    verdict.enforce(
        f"{path}: this machine",
        f"The bundle was judged with {then}, and this machine has {now}. Install the version that judged it, or export "
        "again and judge with the version that will run it",
    )


def _versions(engines: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in engines.items()) or "an engine of unknown version"


def _opened(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Name of each graph, and what happened to the process that opened it; "" where all went well."""
    for component in bundle.exports():
        own = bundle.manifest.components[component.name] is component
        place = component.name if own else f"{component.name} ({component.format})"
        for role, graph in component.graphs.items():
            yield f"{place}/{role}", open_apart(component.engine, bundle.file(graph.path))


def _text(report: dict[str, Any]) -> str:
    line = f"{report['bundle']}: {report['files']} files, {report['bytes'] / 1e6:.1f} MB, all as recorded"
    graphs = report.get("graphs", {})
    return visible(line + (f"; {len(graphs)} graphs opened" if graphs else ""))
