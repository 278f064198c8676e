"""LLM beside codec: every pair of the given bundles' LLMs and codecs, in every mode, all in one process.

    python benchmarks/overlap.py BUNDLE [BUNDLE ...] [--turns 5] [--threads 2]

BUNDLEs are exports of one checkpoint, the first of them the baseline (ONNX INT4): its LLM and codec one after the
other. Each turn asks every pair once in every mode, so that what disturbs the machine disturbs all alike; the answer is
ten seconds of forced codes whose text ends after a third of the frames (benchmarks/measure.py). The encoder is always
the first bundle's. Prints the median and p95 of the real-time factor, the time to first audio after the prefill, and
the frames; samples that differ from the pair's sequential ones end the run. The last line is one JSON object.
Goal: the best pair at 0.85 times the baseline's real-time factor or less.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import product
from typing import Any, get_args

import numpy as np
from measure import CODEC_FRAMES, TEXT_END, WARMUP, question, spread

from edgeomni import AudioChunk, Bundle, Session, TurnEnd
from edgeomni.components import Components, OpenOptions
from edgeomni.hardware import cores, cpu_name
from edgeomni.overlap import Overlap, OverlapMode
from edgeomni.runtimes import chosen_engine, runtime_of

MODES: tuple[OverlapMode, ...] = get_args(OverlapMode)
GOAL = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    given = parser.parse_args()
    bundles = [Bundle.open(path) for path in given.bundles]
    sessions = sessions_of(bundles, given.threads, given.modes)
    times = measured(sessions, given.turns)
    rows = {name: figures(ends) for name, ends in times.items()}
    base = next(iter(rows.values()))["rtf"]["median"]
    for name, row in rows.items():
        row["rtf_ratio"] = row["rtf"]["median"] / base
        print(told(name, row))
    best = min(rows, key=lambda name: rows[name]["rtf"]["median"])
    out = {"cpu": cpu_name(), "threads": given.threads, "turns": given.turns, "goal": GOAL, "best": best, "rows": rows}
    print(json.dumps(out))


def sessions_of(bundles: list[Bundle], threads: int, modes: list[OverlapMode]) -> dict[str, Session]:
    """One session for each pair and mode, on components opened for it as Session.open does. The baseline is first."""
    encoder = opened(bundles[:1], "encoder", OpenOptions(threads)).popitem()[1]
    out: dict[str, dict[OverlapMode, Session]] = defaultdict(dict)
    for beside in sorted({mode != "off" for mode in modes}):
        options = OpenOptions(threads, side_by_side=beside)
        llms, codecs = (opened(bundles, part, options) for part in ("llm", "codec"))
        for (a, llm), (b, codec) in product(llms.items(), codecs.items()):
            for mode in [mode for mode in MODES if mode in modes and (mode != "off") == beside]:
                parts = Components(encoder, llm, codec)
                out[f"{a} + {b}"][mode] = Session(parts, bundles[0].spec, None, Overlap(mode, threads))
    return {f"{pair}, {mode}": session for pair, by_mode in out.items() for mode, session in by_mode.items()}


def opened(bundles: list[Bundle], part: str, options: OpenOptions) -> dict[str, Any]:
    """The different components of that name, by engine and precision."""
    out: dict[str, Any] = {}
    for bundle in bundles:
        component, engine = bundle.manifest.components[part], chosen_engine(bundle, part)
        name = f"{engine.name} {component.format}:{component.precision}"
        if name not in out:
            out[name] = runtime_of(engine).open_component(bundle, part, options)
    return out


def measured(sessions: dict[str, Session], turns: int) -> dict[str, list[TurnEnd]]:
    """The ends of each session's turns after warm-up. Raises SystemExit where a mode changes the sound."""
    spec = next(iter(sessions.values())).spec
    codes = np.random.default_rng(7).integers(0, spec.codec.codebook_size, (CODEC_FRAMES, spec.codec.streams))
    samples, ends, heard = question(), defaultdict(list), dict[str, Any]()
    for turn in range(WARMUP + turns):
        for name, session in sessions.items():
            events = list(
                session.respond("aa", samples, encoder_window="auto", forced_codes=codes, forced_text_end=TEXT_END)
            )
            sound = np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)])
            if not np.array_equal(sound, heard.setdefault(name.rpartition(",")[0], sound)):
                raise SystemExit(f"{name} sounds otherwise than its pair did before")
            if turn >= WARMUP:
                ends[name].append(events[-1])
    return dict(ends)


def figures(ends: list[TurnEnd]) -> dict[str, Any]:
    """RTF (of which the p95 is over turns), milliseconds from prefill to first audio, of frames, pushes and waiting."""
    records = [end.spans.records for end in ends]
    rtf = [end.timings["rtf"] for end in ends]
    return {
        "rtf": {"median": float(np.median(rtf)), "p95": float(np.percentile(rtf, 95)), "n": len(rtf)},
        "first_audio_ms": spread([end.timings["ttfa"] - end.timings["prefill"] for end in ends]),
        "frame_text_ms": spread([s for r in records for s in r["frame"][2:TEXT_END]]),
        "frame_after_ms": spread([s for r in records for s in r["frame"][TEXT_END + 2 :]]),
        "codec_frame_ms": float(np.median([sum(r["codec"]) for r in records]) / CODEC_FRAMES * 1e3),
        "codec_wait_ms": float(np.median([sum(r.get("codec.wait", ())) for r in records]) * 1e3),
    }


def told(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name:60s} RTF {row['rtf']['median']:.4f} (p95 {row['rtf']['p95']:.4f}, {row['rtf_ratio']:.3f} of the "
        f"baseline), first audio {row['first_audio_ms']['median']:.0f} ms after prefill, frame "
        f"{row['frame_text_ms']['median']:.1f} / {row['frame_after_ms']['median']:.1f} ms, codec "
        f"{row['codec_frame_ms']:.1f} ms per frame, waited for it {row['codec_wait_ms']:.0f} ms"
    )


if __name__ == "__main__":
    main()
