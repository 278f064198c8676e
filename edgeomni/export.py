"""Checkpoint -> exporters -> runtimes -> gate -> bundle, renamed into place only when it is whole and judged."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import Bundle, Component, Manifest, describe_files, is_bundle, write_manifest
from .engines import COMPONENTS, FORMATS
from .errors import ExportError, UsageError
from .gate.judge import GateOptions
from .gate.run import judged
from .hardware import check_threads
from .quantize import policy

if TYPE_CHECKING:
    from .model.omni import OmniModel

Say = Callable[[str], None]
TOKENIZER = "tokenizer.json"
STEPS = 9
"""How often `export_bundle` calls `progress`."""
_TOOLS = ("edgeomni", "numpy", "onnx", "onnxruntime", "torch", "transformers", "snac")
_log = logging.getLogger("edgeomni")


def export_bundle(
    source: str | os.PathLike[str] | OmniModel,
    out: str | os.PathLike[str],
    *,
    precision: str = "int4",
    formats: Mapping[str, str] | None = None,
    flavour: str = "ort",
    block: int | None = None,
    gate: GateOptions | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Say = lambda _: None,
    on_gate: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Bundle:
    """Exports a checkpoint directory (or a model in memory) to the bundle directory `out`.

    `precision` fills the components that `formats` ({"encoder": "onnx:int8"}) does not name. `progress` is told
    each step, `on_gate` gets the gate's figures whether they pass or not. Raises UsageError for names and paths
    that make no sense, CheckpointError, ExportError (also for a full disk), and GateError when a figure is missed;
    then, as after Ctrl-C, nothing of the export stays on disk and an older bundle is as it was.
    """
    options = gate or GateOptions()
    target = _checked_target(Path(out), force)
    check_threads(threads)
    wanted = choices(precision, formats or {}, block)
    progress("load checkpoint")
    model = _loaded(source)
    with _staged(target) as stage:
        components: dict[str, Component] = {}
        for name in COMPONENTS:
            progress(f"export {name} ({':'.join(wanted[name])})")
            components[name] = _exported(model, name, stage, wanted[name], flavour, block)
        manifest = _manifest(model, components, stage, _command(wanted, flavour, block))
        report = judged(model, Bundle(stage, manifest), options, threads, progress)
        manifest.gate = report.to_dict()
        on_gate(manifest.gate)
        if options.enforce:
            report.enforce()
        for figure in report.missed:
            _log.warning("gate missed, kept all the same: %s %s is %.6g", figure.part, figure.name, figure.value)
        progress("write bundle")
        write_manifest(stage, manifest)
        _swap(stage, target)
    return Bundle.open(target, hashes=False)


def choices(precision: str, formats: Mapping[str, str], block: int | None = None) -> dict[str, tuple[str, str]]:
    """Component -> (format, precision). Raises UsageError for a component, format or precision that is not offered."""
    if unknown := sorted(set(formats) - set(COMPONENTS)):
        raise UsageError(f"unknown component(s) {', '.join(unknown)}; known are {', '.join(COMPONENTS)}")
    out = {}
    for name, default in policy.component_precisions(precision).items():
        kind, _, chosen = formats.get(name, "onnx").partition(":")
        if kind not in FORMATS:
            raise UsageError(f"{name}: unknown format {kind!r}; known are {', '.join(FORMATS)}")
        out[name] = (kind, chosen or default)
        policy.schemes_for(name, out[name][1], block)
    return out


@contextmanager
def console_progress(title: str = "export") -> Iterator[Say]:
    """A `progress` that draws a bar on a terminal and prints plain lines anywhere else, on stderr."""
    if not sys.stderr.isatty():
        yield lambda step: print(f"{title}: {step}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=STEPS)
        yield lambda step: bar.update(task, advance=1, description=step)


def _loaded(source: str | os.PathLike[str] | OmniModel) -> OmniModel:
    if not isinstance(source, (str, os.PathLike)):
        return source
    from .model import checkpoints

    return checkpoints.load(source)


def _exported(
    model: OmniModel, name: str, stage: Path, wanted: tuple[str, str], flavour: str, block: int | None
) -> Component:
    from . import exporters

    component: Component = exporters.load(wanted[0]).export(model, name, stage, wanted[1], flavour=flavour, block=block)
    return component


def _manifest(model: OmniModel, components: dict[str, Component], stage: Path, command: str) -> Manifest:
    tokenizer = None
    if model.tokenizer_json is not None:
        path = stage / TOKENIZER
        path.write_text(model.tokenizer_json, encoding="utf-8")
        tokenizer = describe_files(stage, [path])[0]
    provenance = {**model.provenance, "tools": _versions(), "command": command}
    if provenance.get("weights") == "trained" and (fresh := _untouched(model)):
        provenance |= {"weights": "random", "random_because": f"{fresh}: every norm is still as initialised"}
    return Manifest(model.spec, components, tokenizer, provenance, dict(model.licences), gate={})


def _untouched(model: OmniModel) -> str:
    """The first of encoder and body whose norms no training step has ever moved; "" where all were trained."""
    for part in ("encoder", "body"):
        norms = [
            p.detach() - (0 if name.endswith("bias") else 1)
            for name, p in getattr(model, part).named_parameters()
            if name.rpartition(".")[0].endswith("norm")
        ]
        if norms and not any(bool(n.any()) for n in norms):
            return part
    return ""


def _command(wanted: Mapping[str, tuple[str, str]], flavour: str, block: int | None) -> str:
    """The command line that makes this bundle again, without this machine's paths."""
    words = ["edgeomni export CHECKPOINT -o BUNDLE", *(f"--{name} {':'.join(w)}" for name, w in wanted.items())]
    words += [f"--flavour {flavour}"] if flavour != "ort" else []
    words += [f"--block {block}"] if block is not None else []
    return " ".join(words)


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found


def _checked_target(target: Path, force: bool) -> Path:
    if target.exists() or target.is_symlink():
        if not force:
            raise UsageError(f"{target} exists; choose another path, or overwrite it with --force")
        if not (is_bundle(target) or (target.is_dir() and not any(target.iterdir()))):
            raise UsageError(f"{target} is no bundle, so --force does not overwrite it; remove it yourself")
    return target


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A directory beside `target` that is gone afterwards, whatever happens; OSError becomes ExportError."""
    stage = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        stage.chmod(0o755)
        yield stage
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ExportError(f"{target}: could not be written ({reason}); free some space or choose another path") from exc
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, target: Path) -> None:
    """Puts the finished bundle under its name; an older one there goes last, or comes back if that fails."""
    old = stage.with_name(f"{stage.name}.old")
    had_old = target.exists()
    if had_old:
        target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        if had_old and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
