"""`edgeomni doctor`: what is here, and what to install for what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table

from .. import __version__
from ..engines import CHECKPOINT, ENGINES, Engine, installed_version, release
from ..hardware import closest_profile, detect, has_nvidia_gpu
from ..install_hint import install_command, replacing_command
from ..printing import say, show
from .common import console
from .llama_build import build_line, llama_build
from .usable import here, reasons, usable

TOOLS = {
    "transformers": ("export", "init and export"),
    "onnx": ("export", "export to onnx"),
    "snac": ("export", "init and export of SNAC codecs"),
    "peft": ("train", "train with LoRA, and merge"),
    "accelerate": ("train", "train"),
    "datasets": ("train", "data prepare, and Hugging Face data"),
    "matplotlib": ("train", "curves of a run, pictures of data check"),
    "espeakng-loader": ("synth", "data synth"),
    "jiwer": ("evaluate", "word error rates of evaluate"),
    "pocketsphinx": ("evaluate", "evaluate --recogniser pocketsphinx"),
    "sounddevice": ("play", "run --play"),
}
"""Distribution that is no engine -> (extra that brings it, what needs it)."""
_ISA = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "neon": "NEON",
    "dotprod": "dot product",
    "i8mm": "I8MM",
    "sve": "SVE",
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="As one JSON line.")
def doctor_(as_json: bool) -> None:
    """List the engines found, their versions and what to install; say what this machine is."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report))
        return
    out = console()
    show(out, _table(report))
    offered = [name.removesuffix("ExecutionProvider") for name in report["providers"]]
    providers = f"providers of onnxruntime: {', '.join(offered) or 'none, it is not installed'}"
    build = [build_line(report["llama_cpp"])] if report["llama_cpp"] else []
    cannot = list(reasons(report["engines"], has_nvidia_gpu()))
    for line in (*_missing(report), *(["", *cannot] if cannot else []), "", providers, *build):
        say(out, line)
    for line in (*_twice(report), *_too_old(report), *_machine(report["machine"])):
        say(out, line)


def examine() -> dict[str, Any]:
    """Versions are read from installed metadata, so that nothing heavy is imported here.

    Engines of bundles are asked in processes of their own which devices they can use: `devices` of each, None for
    torch, which takes seconds to load, and for what is not installed.
    """
    machine = detect()
    engines = {e.name: _part(e.distributions, e.install, _use(e)) for e in ENGINES.values()}
    asked = [e for e in ENGINES.values() if e.formats != (CHECKPOINT,) and engines[e.name]["version"]]
    told = usable(asked)
    for engine in ENGINES.values():
        devices = told.get(engine.name)
        engines[engine.name]["devices"] = devices and {
            device: {"problem": problem, "untested": device in engine.untested} for device, problem in devices.items()
        }
    tools = {name: _part((name,), install_command(extra), f"needed by {use}") for name, (extra, use) in TOOLS.items()}
    facts = {**machine.to_dict(), "closest_profile": closest_profile(machine)}
    return {
        "edgeomni": __version__,
        "engines": engines,
        "tools": tools,
        "providers": _providers(),
        "llama_cpp": llama_build() if engines["llama.cpp"]["version"] else None,
        "machine": facts,
    }


def _part(distributions: tuple[str, ...], install: str, use: str) -> dict[str, Any]:
    return {"version": installed_version(distributions) or None, "install": install, "use": use}


def _use(engine: Engine) -> str:
    formats = [f for f in engine.formats if f != CHECKPOINT]
    what = [f"bundles in {', '.join(formats)}"] if formats else []
    what += ["checkpoints"] if CHECKPOINT in engine.formats else []
    return f"runs {' and '.join(what)} on {' or '.join(engine.devices)}"


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _table(report: dict[str, Any]) -> Table:
    table = Table("engine or tool", "version", "what it is for", "works here", title=f"EdgeOmni {report['edgeomni']}")
    for name, part in report["engines"].items():
        table.add_row(name, part["version"] or "not found", part["use"], here(part))
    for name, part in report["tools"].items():
        table.add_row(name, part["version"] or "not found", part["use"], "")
    return table


def _twice(report: dict[str, Any]) -> Iterator[str]:
    """A warning where two packages provide one engine: they write the same files, and the last one installed is it."""
    for name, engine in ENGINES.items():
        there = [d for d in engine.distributions if installed_version((d,))]
        if engine.exclusive and len(there) > 1 and report["engines"][name]["version"]:
            yield (
                f"note: {' and '.join(there)} are both installed and write the same folder, so that the one installed "
                "last is the one that runs; to change that: "
                f"{replacing_command(' or '.join(there))}"
            )


def _too_old(report: dict[str, Any]) -> Iterator[str]:
    """A note on an engine that opens some bundles only: ONNX Runtime as it is for Python 3.10 is such."""
    for name, engine in ENGINES.items():
        version = report["engines"][name]["version"] or ""
        if version and release(version) < engine.all_from:
            yield (
                f"note: {name} {version} does not open TensorRT's bundles and those of --flavour portable, which need "
                f"{'.'.join(map(str, engine.all_from))} or newer (and so Python 3.11); all other ONNX bundles it opens"
            )


def _missing(report: dict[str, Any]) -> Iterator[str]:
    """What to install, each command on a line of its own, to be copied."""
    commands: dict[str, list[str]] = {}
    for name, part in {**report["engines"], **report["tools"]}.items():
        if not part["version"]:
            commands.setdefault(part["install"], []).append(name)
    for command, names in commands.items():
        yield f"for {', '.join(names)}:"
        yield f"  {command}"


def _machine(facts: dict[str, Any]) -> Iterator[str]:
    """The machine in words."""
    yield f"system: {facts['system']}"
    yield f"processor: {facts['cpu']}, {facts['cores']} core{'s' if facts['cores'] != 1 else ''} to use"
    yield "vector instructions: " + (", ".join(_ISA.get(i, i) for i in facts["isa"]) or "none that matter here")
    memory = facts["memory_gb"]
    yield "memory: " + (f"{memory:g} GB" if memory is not None else "the system does not tell")
    yield f"GPU: {facts['gpu'] or 'none found'}"
    if facts["board"]:
        yield f"board: {facts['board']}"
    yield f"closest hardware profile: {facts['closest_profile'] or 'none fits'}"
