"""Judges a staged bundle against the checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import exporters, runtimes
from ..arrays import F32
from ..audio import log_mel
from ..bundle import Bundle, Component, describe_files, sha256
from ..components import Components, OpenOptions
from ..spec import TASKS, OmniSpec
from ..text import Tokenizer
from . import answers, figures, reference, teacher_forcing
from .judge import GateOptions, Graded, Report, judge

if TYPE_CHECKING:
    from ..model.omni import OmniModel

Say = Callable[[str], None]
Words = Callable[[], tuple[dict[str, float], dict[str, Any]]]
_PROBE_SHARE = 0.4
"""Part of the encoder's window that the synthetic probe fills; the rest is padding, as with most questions."""
_SMALL = 20_000_000
"""Parameters up to which torch computes with one thread: more would only wait for each other."""


def judged(
    model: OmniModel,
    bundle: Bundle,
    options: GateOptions,
    threads: int | None,
    progress: Say,
    words: Words | None = None,
) -> Report:
    """Measures the staged bundle against `model`, and records its outputs in it for `verify --gate`.

    `words` measures points lost on a test set, by task and figure ("aa.exact"), and tells what stands behind them.
    Where stored files are not what the exporter should have written, nothing is run any more: the report then holds
    that alone.
    """
    from ..model.fake_quant import computing_with

    progress("re-read weights")
    measured = _reread(model, bundle)
    report = _verdict(bundle, measured, options, complete=False)
    if report.missed and options.enforce:
        return report
    small = sum(int(p.numel()) for p in model.parameters()) < _SMALL
    how = OpenOptions(threads, as_on_target=True)
    with _sides(model, bundle, how) as sides, computing_with(threads or (1 if small else None)):
        outputs = figures.measure(sides, _windows(model.spec, options), measured, progress)
        if options.questions and model.tokenizer_json is not None:
            _along_answers(sides, model, options, measured, progress)
    path = reference.write(outputs, measured, bundle.path / reference.FILE)
    bundle.manifest.reference = describe_files(bundle.path, [path])[0]
    if words is not None:
        measured.figures["words"], measured.details["words"] = words()
    expected = ["llm.excess"] if sides.llm_rounds else []
    return _verdict(bundle, measured, options, expected=expected)


def _along_answers(
    sides: figures.Sides, model: OmniModel, options: GateOptions, out: figures.Measured, progress: Say
) -> None:
    progress("gate: answers")
    original = answers.Side(sides.torch.encoder, sides.torch.llm)
    exported = answers.Side(sides.exported.encoder, sides.exported.llm)
    tokenizer = Tokenizer(model.tokenizer_json, model.spec.layout)
    found, details = answers.measure(original, exported, model.spec, tokenizer, options.questions)
    out.figures["quality"] |= found
    out.details["answers"] = details


def replayed(bundle: Bundle, components: Components) -> Report:
    """`reference.replay`, with the versions of the engines that ran it now and when the bundle was judged."""
    report = reference.replay(bundle, components)
    versions = {"then": bundle.manifest.gate.get("engines", {}), "now": versions_of(bundle)}
    return Report(report.figures, {**report.details, "engines": versions})


def versions_of(bundle: Bundle) -> dict[str, str]:
    """Engine -> version of its library, for the engines that run this bundle here."""
    return runtimes.versions_of(runtimes.chosen_engine(bundle, name) for name in bundle.manifest.components)


def _verdict(bundle: Bundle, measured: figures.Measured, options: GateOptions, **how: Any) -> Report:
    graded = {name: Graded.of(c) for name, c in bundle.manifest.components.items()}
    poorest = min(graded.values(), key=lambda grade: grade.bits)  # an answer is as good as the poorest part allows
    return judge(
        measured.figures,
        graded | dict.fromkeys(("answers", *TASKS), poorest),
        trained=bundle.manifest.provenance.get("weights") != "random",
        options=options,
        details=measured.details,
        within_reach=measured.within_reach,
        **how,
    )


def _reread(model: OmniModel, bundle: Bundle) -> figures.Measured:
    """What can be told without running anything: stored tensors, files, kernels."""
    out = figures.Measured()
    fidelity, altered = out.figures["fidelity"], list[str]()
    for name, component in bundle.manifest.components.items():
        wrong = _altered(model, component, bundle)
        altered += [f"{name}/{tensor}" for tensor in wrong]
        fidelity[f"{name}.altered"] = len(wrong)
        kernels = runtimes.runtime_of(runtimes.chosen_engine(bundle, name)).wrong_kernels(bundle, name)
        if kernels is not None:
            fidelity[f"{name}.wrong_kernels"] = kernels
    out.details["altered"] = altered
    return out


def _altered(model: OmniModel, component: Component, bundle: Bundle) -> list[str]:
    """Files that are not what the exporter wrote; else stored tensors that are not what the checkpoint gives."""
    files = [entry.path for entry in component.files if sha256(bundle.file(entry.path)) != entry.sha256]
    return files or exporters.exporter_of(component.format).altered(model, component, bundle.path)


@contextmanager
def _sides(model: OmniModel, bundle: Bundle, options: OpenOptions) -> Iterator[figures.Sides]:
    """The staged bundle as a device runs it beside torch, both closed afterwards."""
    llm = bundle.manifest.components["llm"]
    exact = runtimes.runtime_of(runtimes.chosen_engine(bundle, "llm")).open_exact(bundle, "llm", options)
    exported = runtimes.open_components(bundle, options)
    rounds = exporters.exporter_of(llm.format).rounds_inputs(llm)
    try:
        yield figures.Sides(model.spec, _torch_side(model, bundle), exported, exact, rounds)
    finally:
        for opened in (exported.llm, exported.codec, exact):
            if opened is not None:
                opened.close()


def _torch_side(model: OmniModel, bundle: Bundle) -> figures.TorchSide:
    from ..model import fake_quant
    from ..runtimes.torch import TorchEncoder, TorchLanguageModel

    parts = bundle.manifest.components

    def exported(name: str, *, exact: bool = False) -> figures.Context:
        component = parts[name]
        return lambda: exporters.exporter_of(component.format).as_exported(
            model, component, exact=exact, root=bundle.path
        )

    schemes = exporters.exporter_of(parts["llm"].format).stored_schemes(parts["llm"])
    return figures.TorchSide(
        encoder=TorchEncoder(model),
        llm=TorchLanguageModel(model),
        encoder_exported=exported("encoder"),
        llm_exported=exported("llm"),
        llm_exact=exported("llm", exact=True),
        llm_shaken=lambda: fake_quant.jittered(model, "llm", schemes),
        decode=fake_quant.offline_codec(model),
        decode_stored=_stored_decode(model, parts["codec"]),
        decode_double=fake_quant.double_codec(model),
    )


def _stored_decode(model: OmniModel, codec: Component) -> figures.Decode:
    """torch's codec holding its weights as the export stores them, the whole answer in one push."""
    from ..model.fake_quant import offline_codec
    from ..runtimes.torch import TorchCodec

    plan = exporters.exporter_of(codec.format).codec_as_exported(model, codec)
    if plan is None:
        return offline_codec(model)
    decoder = TorchCodec(model, plan)
    return lambda codes: decoder.decode(codes, decoder.open(), True)


def _windows(spec: OmniSpec, options: GateOptions) -> list[F32]:
    """Log-mel windows: the full one and a third of it, of the recordings given or of a synthetic probe."""
    full = 2 * spec.encoder.context
    window = full * spec.front_end.hop
    seconds = _PROBE_SHARE * window / spec.front_end.sample_rate
    sounds = options.speech or [teacher_forcing.probe(spec.front_end, seconds, 0)]
    short = max(2, full // 6 * 2)
    windows = [log_mel(sound[:window], spec.front_end, full) for sound in sounds]
    return [*windows, log_mel(sounds[0][: short * spec.front_end.hop], spec.front_end, short)]
