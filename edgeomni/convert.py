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

from .audio import log_mel
from .bundle import COMPONENTS, Bundle, Component, Manifest, describe_files, is_bundle, sha256, write_manifest
from .errors import ExportError, UsageError
from .evaluate import compare, fidelity
from .evaluate.gate import GateOptions, Report, judge
from .quantize import policy
from .quantize.schemes import parse
from .spec import OmniSpec

if TYPE_CHECKING:
    from .components import F32, Components
    from .model.omni import OmniModel

Say = Callable[[str], None]
TOKENIZER = "tokenizer.json"
STEPS = 9
"""How often `export_bundle` calls `progress`."""
_TOOLS = ("edgeomni", "numpy", "onnx", "onnxruntime", "torch", "transformers", "snac")
_PROBE_SHARE = 0.4
"""Part of the encoder's window that the synthetic probe fills; the rest is padding, as with most questions."""
_SMALL = 20_000_000
"""Parameters up to which torch computes with one thread."""
_log = logging.getLogger("edgeomni")


def export_bundle(
    source: str | os.PathLike[str] | OmniModel, out: str | os.PathLike[str], *, precision: str = "int4",
    formats: Mapping[str, str] | None = None, flavour: str = "ort", block: int | None = None,
    gate: GateOptions | None = None, force: bool = False, threads: int | None = None,
    progress: Say = lambda _: None, on_gate: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Bundle:  # fmt: skip
    """Exports a checkpoint directory (or a model in memory) to the bundle directory `out`.

    `precision` fills the components that `formats` ({"encoder": "onnx:int8"}) does not name. `progress` is told
    each step, `on_gate` gets the gate's figures whether they pass or not. Raises UsageError for names and paths
    that make no sense, CheckpointError, ExportError (also for a full disk), and GateError when a figure is missed;
    then, as after Ctrl-C, nothing of the export stays on disk and an older bundle is as it was.
    """
    options = gate or GateOptions()
    target = _checked_target(Path(out), force)
    wanted = choices(precision, formats or {}, block)
    progress("load checkpoint")
    model = _loaded(source)
    with _staged(target) as stage:
        components = {}
        for name in COMPONENTS:
            progress(f"export {name} ({':'.join(wanted[name])})")
            components[name] = _exported(model, name, stage, wanted[name], flavour, block)
        manifest = _manifest(model, components, stage, _command(wanted, flavour, block))
        report = _judged(model, Bundle(stage, manifest), options, threads, progress)
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
    from . import exporters

    if unknown := sorted(set(formats) - set(COMPONENTS)):
        raise UsageError(f"unknown component(s) {', '.join(unknown)}; known are {', '.join(COMPONENTS)}")
    out = {}
    for name, default in policy.preset(precision).items():
        kind, _, chosen = formats.get(name, "onnx").partition(":")
        if kind not in exporters.TARGETS:
            raise UsageError(f"{name}: unknown format {kind!r}; known are {', '.join(sorted(exporters.TARGETS))}")
        out[name] = (kind, chosen or default)
        policy.plan(name, out[name][1], block)
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
    return Manifest(model.spec, components, tokenizer, provenance, dict(model.licences), gate={})


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


def _judged(
    model: OmniModel, bundle: Bundle, options: GateOptions, threads: int | None, progress: Say
) -> Report:  # fmt: skip
    """Measures the staged bundle against `model`. Files that are wrong as they lie there are not run any more."""
    from .exporters.as_exported import computing_with

    parts = bundle.manifest.components
    trained = model.provenance.get("weights") != "random"
    precisions = {name: c.precision for name, c in parts.items()}

    def verdict(measured: fidelity.Measured) -> Report:
        return judge(measured.figures, precisions, trained=trained, options=options, details=measured.details)

    progress("re-read weights")
    measured = _reread(model, bundle)
    report = verdict(measured)
    if report.missed and options.enforce:
        return report
    exported = _running(bundle, threads)
    with computing_with(threads or (1 if _is_small(model) else None)):
        fidelity.measure(_sides(model, bundle, exported), _windows(model.spec, options), measured, progress)
    exported.llm.close()
    exported.codec.close()
    return verdict(measured)


def _is_small(model: OmniModel) -> bool:
    """More threads would only wait for each other, and on a busy machine for long."""
    return sum(int(p.numel()) for p in model.parameters()) < _SMALL


def _running(bundle: Bundle, threads: int | None) -> Components:
    from . import runtimes

    return runtimes.load(bundle, threads=threads)


def _reread(model: OmniModel, bundle: Bundle) -> fidelity.Measured:
    """What can be told without running anything: stored tensors, files, kernels."""
    out = fidelity.Measured()
    figures, altered = out.figures["fidelity"], list[str]()
    for name, component in bundle.manifest.components.items():
        wrong = _altered(model, component, bundle.path)
        altered += [f"{name}/{tensor}" for tensor in wrong]
        figures[f"{name}.altered"] = len(wrong)
        if name != "codec" and component.meta.get("flavour") == "ort":
            figures[f"{name}.wrong_kernels"] = _wrong_kernels(component, bundle.path)
    out.details["altered"] = altered
    return out


def _sides(model: OmniModel, bundle: Bundle, exported: Components) -> fidelity.Sides:
    from .exporters import as_exported
    from .runtimes.torch_ref import TorchEncoder, TorchLanguageModel

    parts = bundle.manifest.components
    schemes = {name: {group: parse(text) for group, text in c.scheme.items()} for name, c in parts.items()}
    fused = {name: c.meta.get("flavour") == "ort" for name, c in parts.items()}
    return fidelity.Sides(
        model.spec, TorchEncoder(model), TorchLanguageModel(model), as_exported.offline_codec(model), exported,
        lambda name: as_exported.as_exported(model, name, schemes[name], activations=fused[name]),
        lambda name: as_exported.jittered(model, name, schemes[name], kernels=not fused[name]),
    )  # fmt: skip


def _altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Stored tensors that are not what the checkpoint gives, and files that are not what the exporter wrote."""
    from .exporters import onnx_weights

    files = [entry.path for entry in component.files if sha256(root / entry.path) != entry.sha256]
    return files or onnx_weights.altered(model, component, root)


def _wrong_kernels(component: Component, root: Path) -> int:
    from .runtimes.ort_session import optimized_ops

    wrong = 0
    for role, graph in component.graphs.items():
        groups = [g for g in fidelity.GROUPS_OF_GRAPH[role] if g in component.scheme]
        schemes = [parse(component.scheme[g]) for g in groups]
        if any(s.kind not in ("fp32", "fp16") for s in schemes):
            wrong += fidelity.wrong_kernels(schemes, optimized_ops(root / graph["path"]))
    return wrong


def _windows(spec: OmniSpec, options: GateOptions) -> list[F32]:
    """Log-mel windows: the full one and a third of it, of the recordings given or of a synthetic probe."""
    full = 2 * spec.encoder.context
    window = full * spec.front_end.hop
    sounds = options.speech or [compare.probe(spec.front_end, _PROBE_SHARE * window / spec.front_end.sample_rate, 0)]
    short = max(2, full // 6 * 2)
    windows = [log_mel(sound[:window], spec.front_end, full) for sound in sounds]
    return [*windows, log_mel(sounds[0][: short * spec.front_end.hop], spec.front_end, short)]


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
