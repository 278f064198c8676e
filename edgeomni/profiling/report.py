"""A measured report as tables for people and as one JSON line for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

LABELS = {
    "load_s": ("load: open the bundle and its engines", "s"),
    "ttft": ("first text (TTFT)", "s"),
    "ttfa": ("first audio (TTFA)", "s"),
    "total": ("whole turn", "s"),
    "audio": ("audio of the answer", "s"),
    "rtf": ("RTF of the answer, prefill apart", ""),
    "rtf_turn": ("RTF of the whole turn", ""),
    "frames": ("LLM frames", ""),
    "frames_per_s": ("frames per second", ""),
    "peak_rss_mb": ("peak memory", "MB"),
    "bundle_mb": ("bundle on disk", "MB"),
}
"""Figure -> (what it is, unit)."""


BESIDE = {"codec": "codec (overlapped)", "codec.wait": "codec.wait (for it)"}
"""Stages that are shown otherwise where the codec computes beside the LLM."""
OVERLAPPED = (
    "the codec computed beside the LLM, so that its time is part of the frames' time; "
    "what the answer took is frame + codec.wait + the first and the last push of the codec"
)


def figures(report: dict[str, Any]) -> dict[str, float]:
    """The headline figures of a report, those that were measured, in the order of LABELS."""
    flat = {**report["turn"], "load_s": report["load_s"], "peak_rss_mb": report["peak_rss_mb"]}
    flat["bundle_mb"] = report["bundle"].get("mb")
    return {name: flat[name] for name in LABELS if flat.get(name) is not None}


def tables(report: dict[str, Any]) -> Iterator[str | Table]:
    """What was measured, in words; headline figures (medians over turns); stages with percentiles over all spans."""
    yield _subject(report)
    table = Table("figure")
    table.add_column("median", justify="right")
    table.add_column("unit")
    for name, value in figures(report).items():
        table.add_row(LABELS[name][0], f"{value:.4g}", LABELS[name][1])
    yield table
    overlap = report.get("overlap", "off")
    yield _stage_table(report["stages"], BESIDE if overlap != "off" else {})
    if overlap != "off":
        yield f"overlap {overlap}: {OVERLAPPED}"


def _subject(report: dict[str, Any]) -> str:
    job, bundle = report["job"], report["bundle"]
    parts = [f"{k} {v}" for k, v in (report.get("engines") or bundle.get("components", {})).items()]
    if bundle.get("weights") == "random":
        parts.append("random weights")
    if report["forced_frames"]:
        parts.append(f"answer forced to {report['forced_frames']} codec frames")
    how = f"{job['task']}, {job['turns']} turns after {job['warmup']} warm-up, threads {job['threads'] or 'all'}"
    return f"{bundle['name']} on {report['device']}: {how}\n" + "; ".join(parts)


def _stage_table(stages: dict[str, dict[str, float]], shown_as: dict[str, str]) -> Table:
    table = Table("stage")
    for column in ("count", "p50 ms", "p95 ms", "p99 ms", "total s"):
        table.add_column(column, justify="right")
    for name, row in stages.items():
        times = (f"{row[k]:.2f}" for k in ("p50_ms", "p95_ms", "p99_ms"))
        table.add_row(shown_as.get(name, name), f"{row['count']:.0f}", *times, f"{row['total_s']:.3f}")
    return table


def line(report: dict[str, Any]) -> str:
    return json.dumps(report, sort_keys=True)
