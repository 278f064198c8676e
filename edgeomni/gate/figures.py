"""Measures an export: fidelity to torch holding the same weights, quality against the fp32 original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import F32, I64
from ..components import Components, Encoder, LanguageModel
from ..quantize.schemes import Scheme
from ..spec import OmniSpec
from . import metrics, teacher_forcing
from .judge import Part

Decode = Callable[[Sequence[I64]], F32]
Context = Callable[[], AbstractContextManager[None]]
GROUPS_OF_GRAPH = {
    "encoder": ("encoder.linear", "adapter.linear", "adapter.proj"),
    "body": ("body.linear",),
    "tts": ("tts.linear",),
    "text_head": ("text_head",),
    "audio_head": ("audio_head",),
}
"""Graph -> tensor groups whose schemes say which kernels its linear layers run on."""
_OWN_FRAMES = 32
_ROUNDINGS_DB = 20
"""How much more another engine's order of operations may round than torch's does."""
_STEP = 1e-3
"""Share of the logits' spread that one activation rounded the other way, right before a head, may turn."""
_NEAR_TIE = 4 * _STEP
"""Share of the logits' spread up to which a preference is a near-tie."""
_LINEAR = ("MatMulNBits", "MatMul:constant", "DynamicQuantizeMatMul", "MatMulInteger", "DequantizeLinear")


def wrong_kernels(schemes: Iterable[Scheme], ops: Mapping[str, int]) -> int:
    """Linear layers of an optimised graph (operator -> count) that run on none of the integer kernels of `schemes`.

    A kernel that should run and does not appear at all counts as one.
    """
    wanted = {
        "DynamicQuantizeMatMul" if s.kind == "int8_dynamic" else f"MatMulNBits:bits={s.bits}:acc=4" for s in schemes
    }
    others = sum(count for op, count in ops.items() if op.startswith(_LINEAR) and op not in wanted)
    return others + sum(not ops.get(op) for op in wanted)


@dataclass(frozen=True)
class TorchSide:
    """torch, computing the fp32 original, or in one of its contexts what an export should compute.

    `encoder_stored`, `llm_stored`: holding the weights as stored; the encoder and the LLM's heads also round
    activations as their kernels do. `llm_rounding`: all of the LLM does, which None says no kernel does.
    `llm_shaken`, within it: inputs besides shaken by as much as float32 rounds. `decode` (codes per level -> wave
    [S], offline) is the original codec, `decode_stored` the one with the weights as stored, `decode_double` the
    original in float64.
    """

    encoder: Encoder
    llm: LanguageModel
    decode: Decode
    encoder_stored: Context
    llm_stored: Context
    llm_rounding: Context | None
    llm_shaken: Context
    decode_stored: Decode
    decode_double: Decode


@dataclass(frozen=True)
class Sides:
    """Both sides of the comparison. `exact_llm`: the exported files, the body run with float activations."""

    spec: OmniSpec
    torch: TorchSide
    exported: Components
    exact_llm: LanguageModel


@dataclass
class Measured:
    """Figures by part and name ("llm.top1"), and what stands behind them."""

    figures: dict[Part, dict[str, float]] = field(default_factory=lambda: {"fidelity": {}, "quality": {}})
    details: dict[str, Any] = field(default_factory=dict)
    within_reach: dict[str, float] = field(default_factory=dict)
    """What float32 can reach at all on this checkpoint, where that is less than usual."""


def measure(sides: Sides, mels: Sequence[F32], out: Measured, progress: Callable[[str], None] = lambda _: None) -> None:
    """Compares encoder, LLM and codec in turn. `mels`: log-mel [n_mels, t] windows; the first feeds the LLM."""
    progress("gate: encoder")
    features = _encoder(sides, mels, out)
    progress("gate: llm")
    spoken = _llm(sides, features, out)
    progress("gate: codec")
    _codec(sides, spoken, out)


def _encoder(sides: Sides, mels: Sequence[F32], out: Measured) -> F32:
    """Returns the reference's features of the first window."""
    exported = teacher_forcing.encoded(sides.exported.encoder, mels)
    original = teacher_forcing.encoded(sides.torch.encoder, mels)
    with sides.torch.encoder_stored():
        reference = teacher_forcing.encoded(sides.torch.encoder, mels)
    faithful = [metrics.cosine(a, b) for a, b in zip(reference, exported, strict=True)]
    good = [metrics.cosine(a, b) for a, b in zip(original, exported, strict=True)]
    out.figures["fidelity"]["encoder.cosine"] = min(faithful)
    out.figures["quality"]["encoder.cosine"] = min(good)
    windows = {str(mel.shape[1]): [f, g] for mel, f, g in zip(mels, faithful, good, strict=True)}
    out.details["encoder"] = {"cosine by window (fidelity, quality)": windows}
    return reference[0]


def _llm(sides: Sides, features: F32, out: Measured) -> list[teacher_forcing.Script]:
    """Returns the turns that the reference spoke."""
    spec, torch = sides.spec, sides.torch
    with torch.llm_stored():
        turns = [teacher_forcing.speak(torch.llm, spec, script) for script in teacher_forcing.scripts(spec, features)]
    spoken = [script for script, _ in turns]
    exact = [teacher_forcing.follow(sides.exact_llm, spec, script) for script in spoken]
    _faithful(teacher_forcing.joined([logits for _, logits in turns]), teacher_forcing.joined(exact), out)
    del turns, exact
    exported = [teacher_forcing.follow(sides.exported.llm, spec, script) for script in spoken]
    _kernels(sides, spoken[0], exported[0], out)
    original = [teacher_forcing.follow(torch.llm, spec, script) for script in spoken]
    _good(teacher_forcing.joined(original), teacher_forcing.joined(exported), out)
    return spoken


def _faithful(reference: teacher_forcing.Logits, exact: teacher_forcing.Logits, out: Measured) -> None:
    """Same stored weights, float activations: what is left is float32's own rounding, and the heads' to 8 bits."""
    heads = {}
    for name, a in reference.heads().items():
        b, spread = exact.heads()[name], _spread(a)
        top1, ties = metrics.decided_top1(a, b, _NEAR_TIE * spread)
        heads[name] = {"top1": top1, "near_ties": ties, "error": metrics.rms(a, b) / spread}
    fidelity = out.figures["fidelity"]
    fidelity["llm.top1"] = min(h["top1"] for h in heads.values())
    fidelity["llm.near_ties"] = max(h["near_ties"] for h in heads.values())
    fidelity["llm.error"] = max(h["error"] for h in heads.values())
    out.details["llm"] = {"positions": len(reference.text), "heads": heads}


def _kernels(sides: Sides, script: teacher_forcing.Script, exported: teacher_forcing.Logits, out: Measured) -> None:
    """Activations rounded to 8 bits: a chaotic model turns the last bit of a float into other roundings downstream.

    So the error is judged in units of what float32's rounding alone does to the reference, which an honest export
    has about one of.
    """
    spec, torch = sides.spec, sides.torch
    if torch.llm_rounding is None:
        return
    with torch.llm_rounding():
        reference = teacher_forcing.follow(torch.llm, spec, script)
        with torch.llm_shaken():
            shaken = teacher_forcing.follow(torch.llm, spec, script)
    excess = []
    for name, a in reference.heads().items():
        error, noise = (metrics.rms(a, side.heads()[name]) / _spread(a) for side in (exported, shaken))
        excess.append(error / max(noise, _STEP))
        out.details["llm"]["heads"][name] |= {
            "rounded_error": error,
            "rounded_noise": noise,
            "rounded_top1": metrics.top1(a, exported.heads()[name]),
        }
    out.figures["fidelity"]["llm.excess"] = max(excess)


def _spread(logits: F32) -> float:
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


def _codec(sides: Sides, spoken: Sequence[teacher_forcing.Script], out: Measured) -> None:
    codec = sides.spec.codec
    codes = teacher_forcing.emitted_codes(sides.spec, spoken)
    original, reference = sides.torch.decode(codes), sides.torch.decode_stored(codes)
    exported = teacher_forcing.decoded(sides.exported.codec, codec, codes)
    out.figures["fidelity"]["codec.si_sdr"] = metrics.si_sdr(reference, exported)
    out.figures["quality"]["codec.log_mel"] = metrics.log_mel_distance(original, exported, codec.sample_rate)
    own = _own_rounding(sides, codes)
    out.within_reach["codec.si_sdr"] = own - _ROUNDINGS_DB
    out.details["codec"] = {"frames": len(codes[0]) // codec.ids_per_level[0], "torch against float64, dB": own}


def _own_rounding(sides: Sides, codes: Sequence[I64]) -> float:
    """SI-SDR in dB of torch's own float32 decode against float64, on the answer's beginning.

    Well over 100 for a trained codec. One that amplifies rounding (random weights drive thousands into its sines)
    may be far below, and then no other order of additions can come closer to it than that.
    """
    per_level = sides.spec.codec.ids_per_level
    start = [c[: _OWN_FRAMES * n] for c, n in zip(codes, per_level, strict=True)]
    return metrics.si_sdr(sides.torch.decode_double(start), sides.torch.decode(start))
