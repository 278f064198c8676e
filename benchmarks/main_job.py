"""The main job's figures at the real Mini-Omni shape, random weights, two threads, all in one run.

    python benchmarks/main_job.py [--work DIR]      about 15 minutes, 10 GB of disk, 12 GB of memory

Writes a checkpoint (once per DIR), exports it to INT4 (timed, gate included) and fp32, and measures four ways to
answer, each in a process of its own: torch doing what the published code does; torch without that code's wasted work
(our torch runtime: shared prefill, separate heads, the second row dropped); the fp32 bundle; the INT4 bundle. So what
restructuring gains and what quantization gains can be told apart. Prints a table of the four, then the ratios against
their goals; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

HERE = Path(__file__).parent
EXACT = 1e-4


def command(*argv: str | Path) -> tuple[float, float]:
    """Runs a command; returns its wall seconds and its peak memory in GB."""
    began = perf_counter()
    child = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, argv))} failed with exit code {child.returncode}")
    return perf_counter() - began, usage.ru_maxrss / 1e6


def measured(kind: str, source: Path, work: Path, **options: Any) -> dict[str, Any]:
    argv = [sys.executable, HERE / "measure.py", kind, source, work, json.dumps(options)]
    done = subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True)
    print(f"{kind} {source.name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def prepare(work: Path) -> dict[str, Any]:
    """Checkpoint and bundles; the INT4 export is always made anew, because it is measured."""
    edgeomni = Path(sys.executable).with_name("edgeomni")
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        command(edgeomni, "init", "--preset", "mini-omni", "--random", "--seed", "0", "-o", checkpoint)
    if not (work / "fp32").exists():
        command(edgeomni, "export", checkpoint, "-o", work / "fp32", "--precision", "fp32", "--no-gate")
    wall, memory = command(edgeomni, "export", checkpoint, "-o", work / "int4", "--precision", "int4", "--force")
    size = {n: sum(p.stat().st_size for p in (work / n).rglob("*") if p.is_file()) for n in ("int4", "fp32")}
    gate = json.loads((work / "int4" / "bundle.json").read_text())["gate"]
    return {
        "export_s": wall,
        "export_gb": memory,
        "int4_mb": size["int4"] / 1e6,
        "fp32_mb": size["fp32"] / 1e6,
        "encoder_cosine": gate["quality"]["encoder.cosine"]["value"],
    }


def exactness(work: Path) -> tuple[float, int]:
    """Largest error of the streamed answer against torch's offline decode, and its first wrong sample (-1: none)."""
    stream, offline = np.load(work / "stream.npy"), np.load(work / "offline.npy")
    if len(stream) != len(offline):
        return float("inf"), 0
    error = np.abs(stream - offline)
    wrong = np.flatnonzero(error > EXACT)
    return float(error.max()), int(wrong[0]) if len(wrong) else -1


def four_ways(
    torch: dict[str, Any], lean: dict[str, Any], fp32: dict[str, Any], int4: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Medians in milliseconds of the same five stages, 30 s window."""
    published = {stage: torch[f"{stage}_ms"]["median"] for stage in ("encoder", "prefill", "frame")}
    ways = {"torch, as published": {**published, "frame after text": published["frame"]}}
    ways["torch, as published"]["first audio"] = torch["first_audio_s"] * 1e3
    for name, run in (("torch, nothing wasted", lean), ("ONNX fp32", fp32), ("ONNX INT4", int4)):
        figures = run["30 s"]
        ways[name] = {
            "encoder": figures["encoder_ms"]["median"],
            "prefill": figures["prefill_ms"]["median"],
            "frame": figures["frame_text_ms"]["median"],
            "frame after text": figures["frame_after_ms"]["median"],
            "first audio": figures["first_audio_s"] * 1e3,
        }
    return ways


def goals(made: dict[str, Any], torch: dict[str, Any], int4: dict[str, Any], fp32: dict[str, Any]) -> list[Any]:
    """(what, figure, goal, unit, whether more is better)"""
    now, short = int4["30 s"], int4["10 s"]
    two_rows, first = now["frame_text_ms"]["median"], torch["first_audio_s"]
    encoder, codec = torch["encoder_ms"]["median"], int4["codec"]
    return [
        ("INT4 frame, two rows, against torch", torch["frame_ms"]["median"] / two_rows, 8, "x faster", True),
        (
            "INT4 frame after the text, against while it runs",
            two_rows / now["frame_after_ms"]["median"],
            1.5,
            "x faster",
            True,
        ),
        ("RTF of an INT4 answer of 10 s, codec included", now["rtf"], 0.15, "", False),
        (
            "INT4 two-row frame against fp32 ONNX",
            fp32["30 s"]["frame_text_ms"]["median"] / two_rows,
            4,
            "x faster",
            True,
        ),
        ("first audio, 30 s window, against torch", first / now["first_audio_s"], 6, "x sooner", True),
        ("first audio, 10 s window, against torch", first / short["first_audio_s"], 10, "x sooner", True),
        ("encoder INT8, 30 s window, against torch", encoder / now["encoder_ms"]["median"], 4, "x faster", True),
        ("encoder INT8 cosine", made["encoder_cosine"], 0.999, "", True),
        (
            "codec in 4-frame pushes against offline, per frame",
            codec["streamed_ms"]["median"] / codec["offline_ms"]["median"],
            1.25,
            "x",
            False,
        ),
        ("peak RSS of the serving process, INT4", int4["peak_rss_mb"] / 1e3, 0.9, "GB", False),
        ("bundle, INT4 against fp32", made["int4_mb"] / made["fp32_mb"], 0.22, "x", False),
        ("export INT4, gate included", made["export_s"] / 60, 10, "min", False),
        ("export INT4, peak memory", made["export_gb"], 12, "GB", False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoint and bundles are kept [default: a temporary place]")
    work = parser.parse_args().work
    with tempfile.TemporaryDirectory() as scratch:
        work = work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        made = prepare(work)
        torch = measured("torch", work / "checkpoint", work)
        lean = measured("bundle", work / "checkpoint", work, codec_frames=12)
        fp32 = measured("bundle", work / "fp32", work, codec_frames=30)
        int4 = measured("bundle", work / "int4", work, windows={"30 s": 30, "10 s": 10}, codec=True)
        error, wrong = exactness(work)
    ways = four_ways(torch, lean, fp32, int4)
    rows = goals(made, torch, int4, fp32)
    print(
        f"\nstream against torch's offline decode: largest error {error:.1e}, first sample off by {EXACT:g}: "
        f"{'none' if wrong < 0 else wrong}\n"
    )
    for name, way in ways.items():
        print(f"{name:28s}" + "".join(f"  {what} {value:8.1f}" for what, value in way.items()))
    print()
    for what, figure, goal, unit, more in rows:
        met = figure >= goal if more else figure <= goal
        verdict, sense = "met   " if met else "MISSED", ">=" if more else "<="
        print(f"{verdict} {what:55s} {figure:8.3f} {unit:9s} goal {sense} {goal}")
    figures = {what: round(figure, 4) for what, figure, *_ in rows}
    raw = {"stream_error": error, "ways": ways, "made": made, "torch": torch, "lean": lean, "int4": int4, "fp32": fp32}
    print(json.dumps({"figures": figures, **raw}))


if __name__ == "__main__":
    main()
