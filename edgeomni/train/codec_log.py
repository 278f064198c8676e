"""A codec run's log: a line of JSON per record, and the picture drawn from it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..outputs import write_file

LOG, CURVES = "log.jsonl", "curves.png"
Record = dict[str, Any]


def append(folder: Path, record: Record) -> None:
    with (folder / LOG).open("a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def read_log(folder: Path) -> list[Record]:
    """All whole records, in order; a line that a killed process left half written is passed over."""
    path = folder / LOG
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def cut_after(folder: Path, step: int) -> None:
    """Takes away what was logged after `step`: it will be computed again."""
    kept = [record for record in read_log(folder) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_file(folder / LOG, text.encode(), force=True)


def draw(folder: Path) -> None:
    """Three curves over steps: loss, log10-mel distance (training and held out), share of codes used per level."""
    records, whole = read_log(folder), io.BytesIO()
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
    write_file(folder / CURVES, whole.getvalue(), force=True)


def _line(axes: Any, records: list[Record], key: str, label: str) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label)
