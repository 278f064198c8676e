"""A staged bundle against the checkpoint it was made of: what the gate judges."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..arrays import F32
from ..audio import log_mel
from ..bundle import Bundle, Component, sha256
from ..quantize.schemes import parse
from ..spec import OmniSpec
from . import figures, teacher_forcing
from .judge import GateOptions, Report, judge

if TYPE_CHECKING:
    from ..components import Components, LanguageModel
    from ..model.omni import OmniModel

Say = Callable[[str], None]
_PROBE_SHARE = 0.4
"""Part of the encoder's window that the synthetic probe fills; the rest is padding, as with most questions."""
_SMALL = 20_000_000
"""Parameters up to which torch computes with one thread."""


def judged(model: OmniModel, bundle: Bundle, options: GateOptions, threads: int | None, progress: Say) -> Report:
    """Measures the staged bundle against `model`. Files that are wrong as they lie there are not run any more."""
    from ..model.fake_quant import computing_with

    parts = bundle.manifest.components
    trained = bundle.manifest.provenance.get("weights") != "random"
    precisions = {name: c.precision for name, c in parts.items()}

    def verdict(measured: figures.Measured) -> Report:
        return judge(
            measured.figures,
            precisions,
            trained=trained,
            options=options,
            details=measured.details,
            within_reach=measured.within_reach,
        )

    progress("re-read weights")
    measured = _reread(model, bundle)
    report = verdict(measured)
    if report.missed and options.enforce:
        return report
    exported, exact = _running(bundle, threads)
    sides = figures.Sides(model.spec, _torch_side(model, bundle), exported, exact)
    with computing_with(threads or (1 if _is_small(model) else None)):
        figures.measure(sides, _windows(model.spec, options), measured, progress)
    for opened in (exported.llm, exported.codec, exact):
        opened.close()
    return verdict(measured)


def _is_small(model: OmniModel) -> bool:
    """More threads would only wait for each other, and on a busy machine for long."""
    return sum(int(p.numel()) for p in model.parameters()) < _SMALL


def _running(bundle: Bundle, threads: int | None) -> tuple[Components, LanguageModel]:
    """The staged bundle as a device runs it, and its LLM with float activations in the body."""
    from .. import runtimes

    graphs = bundle.manifest.components["llm"].graphs
    exact = [bundle.path / graphs[role].path for role in ("body", "tts") if role in graphs]
    llm: LanguageModel = runtimes.load_component(bundle, "llm", threads=threads, exact=exact)
    return runtimes.load(bundle, threads=threads), llm


def _reread(model: OmniModel, bundle: Bundle) -> figures.Measured:
    """What can be told without running anything: stored tensors, files, kernels."""
    out = figures.Measured()
    fidelity, altered = out.figures["fidelity"], list[str]()
    for name, component in bundle.manifest.components.items():
        wrong = _altered(model, component, bundle.path)
        altered += [f"{name}/{tensor}" for tensor in wrong]
        fidelity[f"{name}.altered"] = len(wrong)
        if name != "codec" and component.meta.get("flavour") == "ort":
            fidelity[f"{name}.wrong_kernels"] = _wrong_kernels(component, bundle.path)
    out.details["altered"] = altered
    return out


def _torch_side(model: OmniModel, bundle: Bundle) -> figures.TorchSide:
    from ..model import fake_quant
    from ..runtimes.torch.llm import TorchEncoder, TorchLanguageModel

    parts = bundle.manifest.components
    schemes = {name: {group: parse(text) for group, text in c.scheme.items()} for name, c in parts.items()}
    fused = {name: c.meta.get("flavour") == "ort" for name, c in parts.items()}
    decode = fake_quant.offline_codec(model)

    def stored(name: str, groups: Collection[str]) -> figures.Context:
        rounding = groups if fused[name] else ()
        return lambda: fake_quant.as_exported(model, name, schemes[name], rounding=rounding)

    rounds = fused["llm"] and any(s.blocked for s in schemes["llm"].values())
    return figures.TorchSide(
        TorchEncoder(model),
        TorchLanguageModel(model),
        decode,
        encoder_stored=stored("encoder", schemes["encoder"]),
        llm_stored=stored("llm", ("text_head", "audio_head")),
        llm_rounding=stored("llm", schemes["llm"]) if rounds else None,
        llm_shaken=lambda: fake_quant.jittered(model, "llm", schemes["llm"]),
        decode_stored=decode if schemes["codec"]["codec"].kind == "fp32" else _halved_decode(model),
        decode_double=fake_quant.double_codec(model),
    )


def _halved_decode(model: OmniModel) -> figures.Decode:
    """torch's codec holding weights rounded to half, the whole answer in one push."""
    from ..model.codec_reader import halved, read_plan
    from ..runtimes.torch.codec import TorchCodec

    codec = TorchCodec(model, halved(read_plan(model.codec, model.spec.codec)))
    return lambda codes: codec.decode(codes, codec.open(), True)


def _altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Stored tensors that are not what the checkpoint gives, and files that are not what the exporter wrote."""
    from ..exporters.onnx import reread

    files = [entry.path for entry in component.files if sha256(root / entry.path) != entry.sha256]
    return files or reread.altered(model, component, root)


def _wrong_kernels(component: Component, root: Path) -> int:
    from ..runtimes.onnxruntime.sessions import optimized_ops

    wrong = 0
    for role, graph in component.graphs.items():
        groups = [g for g in figures.GROUPS_OF_GRAPH[role] if g in component.scheme]
        schemes = [parse(component.scheme[g]) for g in groups]
        if any(s.kind not in ("fp32", "fp16") for s in schemes):
            wrong += figures.wrong_kernels(schemes, optimized_ops(root / graph.path))
    return wrong


def _windows(spec: OmniSpec, options: GateOptions) -> list[F32]:
    """Log-mel windows: the full one and a third of it, of the recordings given or of a synthetic probe."""
    full = 2 * spec.encoder.context
    window = full * spec.front_end.hop
    sounds = options.speech or [
        teacher_forcing.probe(spec.front_end, _PROBE_SHARE * window / spec.front_end.sample_rate, 0)
    ]
    short = max(2, full // 6 * 2)
    windows = [log_mel(sound[:window], spec.front_end, full) for sound in sounds]
    return [*windows, log_mel(sounds[0][: short * spec.front_end.hop], spec.front_end, short)]
