"""The gate's verdict as a sentence, and its figures' names in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..gate.judge import meanings

PARTS = {
    "fidelity": "against torch holding the same stored weights: is the export the same model?",
    "quality": "against the fp32 original: what did the precision cost?",
    "words": "points lost against the fp32 original on a test set: does it still answer right?",
    "device": "this machine against what the export gave when it was judged: does it choose the same?",
}


def verdict(gate: dict[str, Any]) -> str:
    """The outcome as one sentence."""
    found = list(figures(gate))
    if not found:
        return "gate: not judged; the bundle records no figures"
    missed = [f"{part} {name}" for part, name, entry in found if str(entry.get("verdict")).startswith("MISSED")]
    if missed or gate.get("passed") is not True:
        return f"gate: MISSED by {', '.join(missed) or 'a figure below'}; it was kept all the same (--no-gate)"
    judged = sum(entry.get("verdict") == "pass" for _, _, entry in found)
    unjudged = sum("not judged" in str(entry.get("verdict")) for _, _, entry in found)
    more = f"; {unjudged} on quality not judged, for the weights are random" if unjudged else ""
    return f"gate: passed, all {judged} figures judged are within their limits{more}"


def legend(gate: dict[str, Any]) -> Iterator[str]:
    """One line per part and figure of `gate` that has words."""
    yield "what the gate's names mean:"
    known, shown = meanings(), list(figures(gate))
    for part, words in PARTS.items():
        if part in {p for p, _, _ in shown}:
            yield f"  {part}: {words}"
    for part, name, _ in shown:
        spelled = name if part == "fidelity" else f"{part}.{name}"
        if spelled in known:
            yield f"  {spelled}: {known[spelled]}"


def figures(gate: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(part, name, entry) of every figure that bundle.json holds; entries of another form are left out."""
    for part in PARTS:
        entries = gate.get(part)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if isinstance(entry, dict):
                yield part, name, entry
