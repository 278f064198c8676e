"""`edgeomni doctor`: what is here, and what to install for what is not."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import click
from rich.table import Table

from .. import __version__
from ..hardware import closest_profile, detect
from ..install_hint import install_command
from .common import console

PARTS = {
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "", "runs onnx bundles"),
    "torch": (("torch",), "export", "runs checkpoints; needed by init and export"),
    "transformers": (("transformers",), "export", "needed by init and export"),
    "onnx": (("onnx",), "export", "needed by export"),
    "snac": (("snac",), "export", "needed by init and export"),
    "llama-cpp-python": (("llama-cpp-python",), "gguf", "for gguf bundles, not written yet"),
    "openvino": (("openvino",), "openvino", "for openvino bundles, not written yet"),
    "tensorrt-rtx": (("tensorrt-rtx",), "tensorrt", "for tensorrt bundles, not written yet"),
    "tensorrt": (("tensorrt",), "jetson", "for tensorrt bundles on Jetson, not written yet"),
    "optimum": (("optimum",), "optimum", "for optimum's command line, not written yet"),
    "sounddevice": (("sounddevice",), "play", "run --play"),
}
"""Part -> (distributions that bring it, the extra of edgeomni that installs it, what for)."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="As one JSON line.")
def doctor_(as_json: bool) -> None:
    """List the engines found, their versions and what to install; say what this machine is."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report))
        return
    out = console()
    out.print(_table(report))
    for key, value in report["machine"].items():
        out.print(f"{key:>16}: {value}")


def examine() -> dict[str, Any]:
    """Versions are read from installed metadata, so that nothing heavy is imported."""
    machine = detect()
    parts = {
        name: {"version": _version(names), "install": install_command(extra), "use": use}
        for name, (names, extra, use) in PARTS.items()
    }
    facts = {**machine.to_dict(), "closest_profile": closest_profile(machine)}
    return {"edgeomni": __version__, "engines": parts, "providers": _providers(), "machine": facts}


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _table(report: dict[str, Any]) -> Table:
    table = Table("engine or part", "version", "for", "install", title=f"EdgeOmni {report['edgeomni']}")
    for name, part in report["engines"].items():
        use = part["use"] + (f" ({', '.join(report['providers'])})" if name == "onnxruntime" else "")
        missing = not part["version"]
        table.add_row(name, part["version"] or "not found", use, part["install"].replace("[", r"\[") if missing else "")
    return table
