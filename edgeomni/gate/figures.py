"""Measures an export: fidelity to torch holding the same weights, quality against the fp32 original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import F32, I64
from ..components import Components, Encoder, LanguageModel
from ..spec import OmniSpec
from . import metrics, teacher_forcing
from .judge import Part

Decode = Callable[[Sequence[I64]], F32]
Context = Callable[[], AbstractContextManager[None]]
OWN_FRAMES = 32
"""Codec frames on which float32's own rounding is measured."""
_ROUNDINGS_DB = 20
"""How much more another engine's order of operations may round than torch's does."""
_STEP = 1e-3
"""Share of the logits' spread that one activation rounded the other way, right before a head, may turn."""
NEAR_TIE = 4 * _STEP
"""Share of the logits' spread up to which a preference is a near-tie."""


@dataclass(frozen=True)
class TorchSide:
    """torch, computing the fp32 original, or within one of its contexts what an export should compute.

    `encoder_exported`, `llm_exported`: weights as stored, inputs rounded as the kernels round them. `llm_exact`: the
    same as the engine's exact mode computes it (float inputs in the transformer blocks). `llm_shaken`: inputs moved by
    as much as float32 rounds. `decode` (codes per level -> wave [S], offline) is the original codec, `decode_stored`
    the one with the weights as stored, `decode_double` the original in float64.
    """

    encoder: Encoder
    llm: LanguageModel[Any, Any]
    encoder_exported: Context
    llm_exported: Context
    llm_exact: Context
    llm_shaken: Context
    decode: Decode
    decode_stored: Decode
    decode_double: Decode


@dataclass(frozen=True)
class Sides:
    """Both sides of the comparison.

    `exact_llm`: the exported LLM in the engine's exact mode; None where there is none, and then the exported LLM is
    compared as it is. `llm_rounds`: its transformer blocks' kernels round their inputs.
    """

    spec: OmniSpec
    torch: TorchSide
    exported: Components
    exact_llm: LanguageModel[Any, Any] | None
    llm_rounds: bool


@dataclass
class Measured:
    """Figures by part and name ("llm.top1"), and what stands behind them."""

    figures: dict[Part, dict[str, float]] = field(default_factory=lambda: {"fidelity": {}, "quality": {}})
    details: dict[str, Any] = field(default_factory=dict)
    within_reach: dict[str, float] = field(default_factory=dict)
    """What float32 can reach at all on this checkpoint, where that is less than usual."""


@dataclass(frozen=True)
class Outputs:
    """What the exported components gave while they were measured: kept in the bundle for `verify --gate`.

    `features` [F, D] of `mel` [n_mels, t]; `logits` of the first `turn`; `wave` [S] of `codes`.
    """

    mel: F32
    features: F32
    turn: teacher_forcing.Script
    logits: teacher_forcing.Logits
    codes: list[I64]
    wave: F32


def measure(
    sides: Sides, mels: Sequence[F32], out: Measured, progress: Callable[[str], None] = lambda _: None
) -> Outputs:
    """Compares encoder, LLM and codec in turn. `mels`: log-mel [n_mels, t] windows; the first feeds the LLM."""
    progress("gate: encoder")
    reference, exported = _encoder(sides, mels, out)
    progress("gate: llm")
    spoken, logits = _llm(sides, reference[0], out)
    progress("gate: codec")
    codes, wave = _codec(sides, spoken, out)
    return Outputs(mels[-1], exported[-1], spoken[0], logits, codes, wave)


def _encoder(sides: Sides, mels: Sequence[F32], out: Measured) -> tuple[list[F32], list[F32]]:
    """Returns the reference's and the export's features of every window."""
    exported = teacher_forcing.encoded(sides.exported.encoder, mels)
    original = teacher_forcing.encoded(sides.torch.encoder, mels)
    with sides.torch.encoder_exported():
        reference = teacher_forcing.encoded(sides.torch.encoder, mels)
    faithful = [metrics.cosine(a, b) for a, b in zip(reference, exported, strict=True)]
    good = [metrics.cosine(a, b) for a, b in zip(original, exported, strict=True)]
    out.figures["fidelity"]["encoder.cosine"] = min(faithful)
    out.figures["quality"]["encoder.cosine"] = min(good)
    windows = {str(mel.shape[1]): [f, g] for mel, f, g in zip(mels, faithful, good, strict=True)}
    out.details["encoder"] = {"cosine by window (fidelity, quality)": windows}
    return reference, exported


def _llm(sides: Sides, features: F32, out: Measured) -> tuple[list[teacher_forcing.Script], teacher_forcing.Logits]:
    """Returns the turns that the reference spoke, and the export's logits of the first."""
    spec, torch = sides.spec, sides.torch
    with torch.llm_exact() if sides.exact_llm else torch.llm_exported():
        turns = [teacher_forcing.speak(torch.llm, spec, script) for script in teacher_forcing.scripts(spec, features)]
    spoken = [script for script, _ in turns]
    exact = [teacher_forcing.follow(sides.exact_llm or sides.exported.llm, spec, script) for script in spoken]
    _faithful(teacher_forcing.joined([logits for _, logits in turns]), teacher_forcing.joined(exact), out)
    del turns, exact
    exported = [teacher_forcing.follow(sides.exported.llm, spec, script) for script in spoken]
    if sides.llm_rounds:
        _kernels(sides, spoken[0], exported[0], out)
    original = [teacher_forcing.follow(torch.llm, spec, script) for script in spoken]
    _good(teacher_forcing.joined(original), teacher_forcing.joined(exported), out)
    return spoken, exported[0]


def _faithful(reference: teacher_forcing.Logits, exact: teacher_forcing.Logits, out: Measured) -> None:
    """With the same stored weights and float inputs, only float32's own rounding and the heads' 8 bits are left."""
    heads = {}
    for name, a in reference.heads().items():
        b, width = exact.heads()[name], spread(a)
        top1, ties = metrics.decided_top1(a, b, NEAR_TIE * width)
        heads[name] = {"top1": top1, "near_ties": ties, "error": metrics.rms(a, b) / width}
    fidelity = out.figures["fidelity"]
    fidelity["llm.top1"] = min(h["top1"] for h in heads.values())
    fidelity["llm.near_ties"] = max(h["near_ties"] for h in heads.values())
    fidelity["llm.error"] = max(h["error"] for h in heads.values())
    out.details["llm"] = {"positions": len(reference.text), "heads": heads}


def _kernels(sides: Sides, script: teacher_forcing.Script, exported: teacher_forcing.Logits, out: Measured) -> None:
    """The kernels that round their inputs to 8 bits, against torch that rounds its inputs in the same way.

    A difference in the last bit of a float can push a value to the next of the 256 steps, and later layers enlarge
    that. So the error is told in units of the error that float32's own rounding causes in the reference: an honest
    export has about one such unit.
    """
    spec, torch = sides.spec, sides.torch
    with torch.llm_exported():
        reference = teacher_forcing.follow(torch.llm, spec, script)
        with torch.llm_shaken():
            shaken = teacher_forcing.follow(torch.llm, spec, script)
    excess = []
    for name, a in reference.heads().items():
        error, noise = (metrics.rms(a, side.heads()[name]) / spread(a) for side in (exported, shaken))
        excess.append(error / max(noise, _STEP))
        out.details["llm"]["heads"][name] |= {
            "rounded_error": error,
            "rounded_noise": noise,
            "rounded_top1": metrics.top1(a, exported.heads()[name]),
        }
    out.figures["fidelity"]["llm.excess"] = max(excess)


def spread(logits: F32) -> float:
    """Standard deviation of logits, the unit in which differences between them are told; 1 where all are equal."""
    return float(logits.std(dtype=np.float64)) or 1.0


def _good(original: teacher_forcing.Logits, exported: teacher_forcing.Logits, out: Measured) -> None:
    heads = {
        name: {"kl": metrics.kl(a, exported.heads()[name]), "top1": metrics.top1(a, exported.heads()[name])}
        for name, a in original.heads().items()
    }
    out.figures["quality"]["llm.kl"] = max(h["kl"] for h in heads.values())
    out.figures["quality"]["llm.top1"] = min(h["top1"] for h in heads.values())
    for name, figures in heads.items():
        out.details["llm"]["heads"][name]["quality"] = figures


def _codec(sides: Sides, spoken: Sequence[teacher_forcing.Script], out: Measured) -> tuple[list[I64], F32]:
    """Returns the codes of an answer's beginning, and the export's wave of them."""
    codec = sides.spec.codec
    codes = teacher_forcing.emitted_codes(sides.spec, spoken)
    original, reference = sides.torch.decode(codes), sides.torch.decode_stored(codes)
    exported = teacher_forcing.decoded(sides.exported.codec, codec, codes)
    out.figures["fidelity"]["codec.si_sdr"] = metrics.si_sdr(reference, exported)
    out.figures["quality"]["codec.log_mel"] = metrics.log_mel_distance(original, exported, codec.sample_rate)
    start = [c[: OWN_FRAMES * n] for c, n in zip(codes, codec.ids_per_level, strict=True)]
    own = _own_rounding(sides, start)
    out.within_reach["codec.si_sdr"] = own - _ROUNDINGS_DB
    out.details["codec"] = {"frames": len(codes[0]) // codec.ids_per_level[0], "torch against float64, dB": own}
    return start, teacher_forcing.decoded(sides.exported.codec, codec, start)


def _own_rounding(sides: Sides, codes: Sequence[I64]) -> float:
    """SI-SDR in dB of torch's own float32 decode against float64, on the answer's beginning.

    Well over 100 for a trained codec. A codec that amplifies rounding (random weights drive thousands into its sines)
    may be far below, and then no other order of additions can come closer to it than that.
    """
    return metrics.si_sdr(sides.torch.decode_double(codes), sides.torch.decode(codes))
