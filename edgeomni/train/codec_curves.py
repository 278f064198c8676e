"""The picture of a codec run's log: losses, spectral distance, and how many codes are used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..outputs import write_file

Record = dict[str, Any]


def draw(records: Sequence[Record], out: Path) -> None:
    """Three curves over steps: loss, log10-mel distance (training and held out), codes used per level; a PNG."""
    whole = io.BytesIO()
    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, mel, use = figure.subplots(3, 1, sharex=True)
    _line(loss, records, "loss", "loss")
    _line(mel, records, "log_mel", "training")
    _line(mel, records, "held_out", "held out (1024 samples, 80 bands)")
    with_use = [record for record in records if record.get("used")]
    for level in range(len(with_use[-1]["used"]) if with_use else 0):
        for name, style in (("used", "-"), ("perplexity", ":")):
            values = [record[name][level] for record in with_use]
            use.plot([record["step"] for record in with_use], values, style, label=f"level {level}: {name}")
    for axes, title in ((loss, "loss"), (mel, "log10-mel distance"), (use, "codes per level")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    use.set_xlabel("step")
    figure.savefig(whole, format="png", dpi=100)
    write_file(out, whole.getvalue(), force=True)


def _line(axes: Any, records: Sequence[Record], key: str, label: str) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label)
