"""The gate's verdict and its figures' names in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PARTS = {
    "fidelity": "against torch holding the same stored weights: is the export the same model?",
    "quality": "against the fp32 original: what did the precision cost?",
}
FIGURES = {
    "encoder.cosine": "cosine similarity of the encoder's features, of the worst window; 1 means the same",
    "llm.top1": "share of positions at which both sides' first choice is the same, of the worst head",
    "llm.near_ties": "share of positions at which rounding alone decides between two choices, of the worst head",
    "llm.error": "root mean square difference of the logits, in units of their spread, of the worst head",
    "llm.excess": "error of the integer kernels, in units of what float32 rounding alone causes; about 1 is honest",
    "llm.kl": "Kullback-Leibler divergence of the choices' probabilities in nats, of the worst head; 0 means the same",
    "codec.si_sdr": "difference of the two waves as a signal-to-distortion ratio in dB; higher is closer",
    "codec.log_mel": "mean difference of the two sounds' log-mel spectra; 0 means the same",
    "altered": "stored tensors that differ from what quantizing the checkpoint gives",
    "wrong_kernels": "linear layers that do not run on the operator that their precision asks for",
}
"""Figure -> what it says; the last two go by their last word and stand for every component."""


def verdict(gate: dict[str, Any]) -> str:
    """The outcome as one sentence."""
    figures = [(part, name, entry) for part in PARTS for name, entry in gate.get(part, {}).items()]
    if not figures:
        return "gate: not judged; the bundle records no figures"
    missed = [f"{part} {name}" for part, name, entry in figures if entry.get("verdict") == "MISSED"]
    if missed or gate.get("passed") is False:
        return f"gate: MISSED by {', '.join(missed) or 'a figure below'}; it was kept all the same (--no-gate)"
    judged = sum(entry.get("verdict") == "pass" for _, _, entry in figures)
    unjudged = sum("not judged" in str(entry.get("verdict")) for _, _, entry in figures)
    more = f"; {unjudged} on quality not judged, for the weights are random" if unjudged else ""
    return f"gate: passed, all {judged} figures judged are within their limits{more}"


def legend(gate: dict[str, Any]) -> Iterator[str]:
    """One line per part and figure of `gate` that has words here."""
    yield "what the gate's names mean:"
    told = set()
    for part, words in PARTS.items():
        if gate.get(part):
            yield f"  {part}: {words}"
    for part in PARTS:
        for name in gate.get(part, {}):
            key = name if name in FIGURES else name.rpartition(".")[2]
            if key in FIGURES and key not in told:
                told.add(key)
                yield f"  {key}: {FIGURES[key]}"
