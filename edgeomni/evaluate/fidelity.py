"""Measures an export: fidelity to torch holding the same weights, quality against the fp32 original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..components import Components, Encoder, LanguageModel
from ..quantize.schemes import Scheme
from ..spec import OmniSpec
from . import compare, metrics
from .gate import Part

F32 = NDArray[np.float32]
Context = Callable[[str], AbstractContextManager[None]]
_TIE_SIGMAS = 6
"""A near-tie lies within this many standard deviations of the reference's own rounding noise."""
_LEAST_NOISE = 1e-4
"""Share of the logits' spread below which noise is not told from none."""


GROUPS_OF_GRAPH = {
    "encoder": ("encoder.linear", "adapter.linear", "adapter.proj"), "body": ("body.linear",), "tts": ("tts.linear",),
    "text_head": ("text_head",), "audio_head": ("audio_head",),
}  # fmt: skip
"""Graph -> tensor groups whose schemes say which kernels its linear layers run on."""
_STEP = 1e-3
"""Share of the logits' spread that a single rounding of a quantized activation may turn."""
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
class Sides:
    """Both sides of the comparison.

    `encoder`, `llm` and `decode` (codes per level -> wave [S], offline) compute the fp32 original; inside
    `as_exported(component)` they compute with what the export stores, and inside `jittered(component)` besides that
    with inputs shaken by rounding.
    """

    spec: OmniSpec
    encoder: Encoder
    llm: LanguageModel
    decode: Callable[[Sequence[NDArray[np.int64]]], F32]
    exported: Components
    as_exported: Context
    jittered: Context


@dataclass
class Measured:
    """Figures by part and name ("llm.top1"), and what stands behind them."""

    figures: dict[Part, dict[str, float]] = field(default_factory=lambda: {"fidelity": {}, "quality": {}})
    details: dict[str, Any] = field(default_factory=dict)


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
    exported = compare.encoded(sides.exported.encoder, mels)
    original = compare.encoded(sides.encoder, mels)
    with sides.as_exported("encoder"):
        reference = compare.encoded(sides.encoder, mels)
    faithful = [metrics.cosine(a, b) for a, b in zip(reference, exported, strict=True)]
    good = [metrics.cosine(a, b) for a, b in zip(original, exported, strict=True)]
    out.figures["fidelity"]["encoder.cosine"] = min(faithful)
    out.figures["quality"]["encoder.cosine"] = min(good)
    windows = {str(mel.shape[1]): [f, g] for mel, f, g in zip(mels, faithful, good, strict=True)}
    out.details["encoder"] = {"cosine by window (fidelity, quality)": windows}
    return reference[0]


def _llm(sides: Sides, features: F32, out: Measured) -> list[compare.Script]:
    """Returns the turns that the reference spoke."""
    spec, llm = sides.spec, sides.llm
    with sides.as_exported("llm"):
        turns = [compare.speak(llm, spec, script) for script in compare.scripts(spec, features)]
        with sides.jittered("llm"):
            shaken = compare.follow(llm, spec, turns[0][0])
    spoken = [script for script, _ in turns]
    exported = [compare.follow(sides.exported.llm, spec, script) for script in spoken]
    heads = turns[0][1].heads()
    noise = {name: metrics.rms(logits, shaken.heads()[name]) for name, logits in heads.items()}
    _faithful(compare.joined([logits for _, logits in turns]), compare.joined(exported), noise, out)
    original = [compare.follow(llm, spec, script) for script in spoken]
    _good(compare.joined(original), compare.joined(exported), out)
    return spoken


def _faithful(reference: compare.Logits, exported: compare.Logits, noise: dict[str, float], out: Measured) -> None:
    heads = {}
    for name, a in reference.heads().items():
        b = exported.heads()[name]
        spread = float(a.std(dtype=np.float64)) or 1.0
        own = max(noise[name], _LEAST_NOISE * spread)
        decided, ties = metrics.decided_top1(a, b, _TIE_SIGMAS * own)
        heads[name] = {
            "top1": decided, "near_ties": ties, "error": metrics.rms(a, b) / spread, "noise": own / spread,
        }  # fmt: skip
    fidelity = out.figures["fidelity"]
    fidelity["llm.top1"] = min(h["top1"] for h in heads.values())
    fidelity["llm.near_ties"] = float(np.mean([h["near_ties"] for h in heads.values()]))
    fidelity["llm.excess"] = max(h["error"] / max(h["noise"], _STEP) for h in heads.values())
    out.details["llm"] = {"positions": len(reference.text), "heads": heads}


def _good(original: compare.Logits, exported: compare.Logits, out: Measured) -> None:
    heads = {
        name: {"kl": metrics.kl(a, exported.heads()[name]), "top1": metrics.top1(a, exported.heads()[name])}
        for name, a in original.heads().items()
    }
    out.figures["quality"]["llm.kl"] = max(h["kl"] for h in heads.values())
    out.figures["quality"]["llm.top1"] = min(h["top1"] for h in heads.values())
    for name, figures in heads.items():
        out.details["llm"]["heads"][name]["quality"] = figures


def _codec(sides: Sides, spoken: Sequence[compare.Script], out: Measured) -> None:
    codec = sides.spec.codec
    codes = compare.emitted_codes(sides.spec, spoken)
    original = sides.decode(codes)
    exported = compare.decoded(sides.exported.codec, codec, codes)
    out.figures["fidelity"]["codec.si_sdr"] = metrics.si_sdr(original, exported)
    out.figures["quality"]["codec.log_mel"] = metrics.log_mel_distance(original, exported, codec.sample_rate)
    out.details["codec"] = {"frames": len(codes[0]) // codec.ids_per_level[0]}
