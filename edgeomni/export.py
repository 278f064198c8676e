"""Checkpoint -> exporters -> runtimes -> gate -> bundle, renamed into place only when it is whole and judged."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import Field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import exporters, runtimes
from .bundle import MANIFEST, Bundle, Component, Manifest, describe_files, is_bundle, write_manifest
from .calibration import CalibrationData, Turns, calibrating, recorded
from .components import OpenOptions
from .engines import COMPONENTS, FORMATS
from .errors import ExportError, UsageError
from .evaluate.lost import JudgeData, points_lost
from .gate.judge import GateOptions
from .gate.run import Words, judged, versions_of
from .hardware import check_threads
from .outputs import check_directory, first_few, named, new_directory, strangers
from .quantize import policy
from .quantize.schemes import Scheme, has_codes_by_block, is_static
from .session import Session
from .shipped import found

if TYPE_CHECKING:
    from .model.omni import OmniModel

Say = Callable[[str], None]
TOKENIZER = "tokenizer.json"
STEPS, JUDGE_STEPS = 9, 3
"""How often `export_bundle` calls `progress`, and how often more where a test set judges."""
REPEATED = "calibrate:"
"""Steps that begin so are told as often as there are questions and blocks, and are not counted."""
_TOOLS = ("edgeomni", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt-rtx", "torch", "transformers", "snac")
_log = logging.getLogger("edgeomni")


def export_bundle(
    source: str | os.PathLike[str] | OmniModel,
    out: str | os.PathLike[str],
    *,
    precision: str = "int4",
    formats: Mapping[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    gate: GateOptions | None = None,
    judge: JudgeData | None = None,
    calibrate: CalibrationData | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Say = lambda _: None,
    on_gate: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Bundle:
    """Exports a checkpoint directory (or a model in memory) to the bundle directory `out`.

    `precision` fills the components that `formats` ({"encoder": "onnx:int8"}) does not name. `options` are the formats'
    own options, by format ({"onnx": {"flavour": "portable", "block": 32}}). `judge` is a test set that the checkpoint
    and the export both answer; the points that the export loses join the gate as its part "words". `calibrate` holds
    questions by which the LLM's integer codes are chosen, so that its answers change less, and on which the ranges of
    inputs that TensorRT rounds are measured. `progress` is told each step, `on_gate` gets the gate's figures whether
    they pass or not. Raises UsageError for names and paths that make no sense, CheckpointError, ExportError (also for a
    full disk), DataError for a test set or calibration data that cannot be used, and GateError when a figure is missed;
    then, as after Ctrl-C, nothing of the export stays on disk and an older bundle is as it was.
    """
    limits = gate or GateOptions()
    target = _checked_target(source, out, force)
    check_threads(threads)
    wanted = choices(precision, formats or {}, options)
    own = _own_options((format_ for format_, _ in wanted.values()), options or {})
    for note in _notes(wanted, own):
        _log.warning("%s", note)
    if calibrate is not None:
        _check_calibrated(wanted, own)
    progress("load checkpoint")
    model = _loaded(source)
    if judge is not None and not limits.questions:
        limits = replace(limits, questions=judge.questions(model.spec.front_end.sample_rate))
    turns = _turns(model, calibrate, threads, progress)
    with _staged(target, force) as stage, calibrating(model, turns, progress):
        components: dict[str, Component] = {}
        for name in COMPONENTS:
            progress(f"export {name} ({':'.join(wanted[name])})")
            components[name] = _exported(model, name, stage, wanted[name], own, progress)
        asked = {"command": _command(wanted, own, calibrate)} | (
            turns.facts(_uses_of_turns(components)) if turns else {}
        )
        manifest = _manifest(model, components, stage, asked)
        staged = Bundle(stage, manifest)
        report = judged(model, staged, limits, threads, progress, _words(model, staged, judge, threads, progress))
        manifest.gate = {**report.to_dict(), "engines": versions_of(staged)}
        on_gate(manifest.gate)
        if limits.enforce:
            report.enforce()
        for figure in report.missed:
            _log.warning("gate missed, kept all the same: %s %s is %.6g", figure.part, figure.name, figure.value)
        progress("write bundle")
        write_manifest(stage, manifest)
    return Bundle.open(target, hashes=False)


def choices(
    precision: str, formats: Mapping[str, str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, tuple[str, str]]:
    """Component -> (format, precision). Raises UsageError for a component, format, precision or option not offered."""
    if unknown := sorted(set(formats) - set(COMPONENTS)):
        raise UsageError(f"unknown component(s) {', '.join(unknown)}; known are {', '.join(COMPONENTS)}")
    own = _own_options(FORMATS, options or {})
    out: dict[str, tuple[str, str]] = {}
    for name in COMPONENTS:
        kind, _, chosen = formats.get(name, "onnx").partition(":")
        if kind not in FORMATS:
            raise UsageError(f"{name}: unknown format {kind!r}; known are {', '.join(FORMATS)}")
        out[name] = (kind, chosen or policy.component_precisions(precision, kind)[name])
        exporters.exporter_of(kind).schemes_for(name, out[name][1], own[kind])
    return out


@contextmanager
def console_progress(title: str = "export", steps: int = STEPS) -> Iterator[Say]:
    """A `progress` that draws a bar of `steps` on a terminal and prints plain lines anywhere else, on stderr."""
    if not sys.stderr.isatty():
        yield lambda step: print(f"{title}: {step}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda step: bar.update(task, advance=not step.startswith(REPEATED), description=step)


def _loaded(source: str | os.PathLike[str] | OmniModel) -> OmniModel:
    if not isinstance(source, (str, os.PathLike)):
        return source
    from .model import checkpoints
    from .train.merging import merged_model
    from .train.run import RunFolder, is_run

    path = Path(source)
    if is_run(path) and not RunFolder(path).checkpoint.is_dir():  # the adapter is all that was kept of the run
        return merged_model(path)
    return checkpoints.load(source)


def _own_options(formats: Iterable[str], given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Format -> its own options: those given, and the defaults of the others. Raises UsageError for unknown ones."""
    return {format_: exporters.options_of(format_, given.get(format_, {})) for format_ in {*formats, *given}}


def _notes(wanted: Mapping[str, tuple[str, str]], options: Mapping[str, Any]) -> Iterator[str]:
    """What the formats have to say once about the components that they get."""
    for format_ in dict.fromkeys(chosen for chosen, _ in wanted.values()):
        of_format = [name for name, (chosen, _) in wanted.items() if chosen == format_]
        yield from exporters.exporter_of(format_).notes(of_format, options[format_])


def _check_calibrated(wanted: Mapping[str, tuple[str, str]], options: Mapping[str, Any]) -> None:
    """Raises UsageError where recorded turns would decide nothing of an export."""
    schemes = {
        name: exporters.exporter_of(format_).schemes_for(name, precision, options[format_])
        for name, (format_, precision) in wanted.items()
    }
    if not _decided(schemes):
        format_, precision = wanted["llm"]
        hint = "; for GGUF give --imatrix instead" if format_ == "gguf" else ""
        raise UsageError(
            f"calibrating would change nothing: llm {format_}:{precision} has no integer codes in blocks, and no "
            "component rounds its inputs by ranges that are measured. It is for int4 and int8 of onnx and openvino, "
            f"and for all but fp32, fp16 and bf16 of tensorrt{hint}"
        )


def _uses_of_turns(components: Mapping[str, Component]) -> list[str]:
    return _decided({name: exporters.exporter_of(c.format).stored_schemes(c) for name, c in components.items()})


def _decided(schemes: Mapping[str, Mapping[str, Scheme]]) -> list[str]:
    """What recorded turns decide of components whose tensors are stored so: codes, ranges."""
    codes = any(has_codes_by_block(s) for group, s in schemes["llm"].items() if group.startswith(("body.", "tts.")))
    ranges = any(is_static(s) for of_component in schemes.values() for s in of_component.values())
    return [use for use, used in (("gptq", codes), ("input ranges", ranges)) if used]


def _turns(model: OmniModel, data: CalibrationData | None, threads: int | None, progress: Say) -> Turns | None:
    if data is None:
        return None
    from .model.fake_quant import computing_with

    with computing_with(threads):
        return recorded(model, data, progress)


def _exported(
    model: OmniModel, name: str, stage: Path, wanted: tuple[str, str], options: Mapping[str, Any], progress: Say
) -> Component:
    format_, precision = wanted
    return exporters.exporter_of(format_).export(model, name, stage, precision, options[format_], progress)


def _words(
    model: OmniModel, staged: Bundle, judge: JudgeData | None, threads: int | None, progress: Say
) -> Words | None:
    """What measures the points lost on the test set, when the gate asks for it."""
    if judge is None:
        return None

    def measured() -> tuple[dict[str, float], dict[str, Any]]:
        from .model.fake_quant import computing_with
        from .runtimes.torch import components_of

        original = Session(components_of(model), model.spec, model.tokenizer_json)
        with computing_with(threads), closing(runtimes.open_components(staged, OpenOptions(threads))) as components:
            exported = Session(components, model.spec, model.tokenizer_json)
            return points_lost(original, exported, judge, progress)

    return measured


def _manifest(
    model: OmniModel, components: dict[str, Component], stage: Path, asked: Mapping[str, str | int]
) -> Manifest:
    tokenizer = None
    if model.tokenizer_json is not None:
        path = stage / TOKENIZER
        path.write_text(model.tokenizer_json, encoding="utf-8")
        tokenizer = describe_files(stage, [path])[0]
    provenance = {**model.provenance, "tools": _versions(), **asked}
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


def _command(
    wanted: Mapping[str, tuple[str, str]], options: Mapping[str, Any], calibrate: CalibrationData | None
) -> str:
    """The command line that makes this bundle again, without this machine's paths; options have their own names."""
    words = ["edgeomni export CHECKPOINT -o BUNDLE", *(f"--{name} {':'.join(w)}" for name, w in wanted.items())]
    for own in (options[format_] for format_ in dict.fromkeys(w[0] for w in wanted.values())):
        given = [field for field in fields(own) if getattr(own, field.name) != field.default]
        words += [f"--{field.name}{_value(field, own)}" for field in given]
    if calibrate is not None:
        words += ["--calibrate DATA", f"--calibrate-limit {calibrate.limit}"]
    return " ".join(words)


def _value(option: Field[Any], own: Any) -> str:
    """The value of an option with the space before it; "" for a flag."""
    value = "FILE" if option.metadata.get("path") else getattr(own, option.name)
    return "" if value is True else f" {value}"


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found


def _checked_target(source: str | os.PathLike[str] | OmniModel, out: str | os.PathLike[str], force: bool) -> Path:
    """The bundle's path. Raises UsageError where a bundle may not be put, above all in, on or around its source."""
    target = named(out)
    if isinstance(source, (str, os.PathLike)):
        ours, theirs = Path(os.path.realpath(target)), Path(os.path.realpath(found(source, "checkpoint")))
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise UsageError(f"the bundle {target} and the checkpoint {source} lie in one another; choose another path")
    return check_directory(target, _objection if force else None)


@contextmanager
def _staged(target: Path, force: bool) -> Iterator[Path]:
    """A directory that becomes `target` if the block ends well; OSError becomes ExportError."""
    try:
        with new_directory(target, _objection if force else None) as stage:
            yield stage
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ExportError(f"{target}: could not be written ({reason}); free some space or choose another path") from exc


def _objection(directory: Path) -> str:
    """Why --force must not replace a directory; "" for a bundle that holds its own files and nothing else."""
    if not is_bundle(directory):
        return "is no bundle"
    try:
        listed = set(_listed_files(json.loads((directory / MANIFEST).read_bytes())))
    except ValueError:
        return f"has a {MANIFEST} that cannot be read, so what else is in it may be yours"
    others = strangers(directory, listed | {MANIFEST})
    return f"also holds {first_few(others)}, which its {MANIFEST} does not list" if others else ""


def _listed_files(data: Any) -> Iterator[str]:
    """Paths of all file entries of a manifest, of any schema version and also if it is incomplete otherwise."""
    if isinstance(data, dict) and isinstance(data.get("path"), str) and "sha256" in data:
        yield data["path"]
    for part in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _listed_files(part)
