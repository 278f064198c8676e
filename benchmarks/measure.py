"""One measurement in a process of its own: python benchmarks/measure.py KIND SOURCE WORK [options as JSON].

KIND is torch (the published way, benchmarks/published.py) or bundle. Prints one JSON line; arrays that the parent
compares (codes, waves, features) lie in WORK.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from edgeomni.arrays import F32, I64

SAMPLE_SECONDS = 5.0
CODEC_FRAMES, TEXT_END = 117, 40
THREADS = 2
TURNS, WARMUP = 5, 1
TORCH_TURNS, TORCH_FRAMES = 3, 16
CODEC_PUSH = 4


def question(rate: int = 16000) -> F32:
    """Five seconds of gliding harmonics: only their length matters to the timings."""
    t = np.arange(int(SAMPLE_SECONDS * rate)) / rate
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.sin(3 * t)) / rate
    voice = sum(np.sin(h * phase) / h for h in range(1, 12))
    return (0.1 * voice * (0.6 + 0.4 * np.sin(16 * t))).astype(np.float32)


def forced_codes(work: Path, codebook: int, streams: int) -> I64:
    """The same random codec frames for every process of a run."""
    path = work / "codes.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(7).integers(0, codebook, (CODEC_FRAMES, streams)))
    return np.load(path)


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, p95, and how many were counted."""
    ms = np.array(seconds) * 1e3
    return {"median": float(np.median(ms)), "p95": float(np.percentile(ms, 95)), "n": len(ms)}


def peak_rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000
    return float("nan")


def measure_torch(source: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    import torch
    from published import respond

    from edgeomni.model import checkpoints
    from edgeomni.tokens import frames_to_codes

    torch.set_num_threads(THREADS)
    model = checkpoints.load(source)
    codes = forced_codes(work, model.spec.codec.codebook_size, model.spec.codec.streams)
    samples = question()
    respond(model, samples, codes, 3)
    turns = [respond(model, samples, codes, TORCH_FRAMES) for _ in range(TORCH_TURNS)]
    offline_codes = [torch.from_numpy(c)[None] for c in frames_to_codes(codes, model.spec.codec)]
    np.save(work / "offline.npy", model.decode_codes(offline_codes).detach().numpy())
    return {
        "encoder_ms": spread([t.encoder for t in turns]),
        "prefill_ms": spread([t.prefill for t in turns]),
        "frame_ms": spread([f for t in turns for f in t.frames]),
        "codec_chunk_ms": spread([c for t in turns for c in t.chunks]),
        "first_audio_s": median(t.first_audio for t in turns),
        "peak_rss_mb": peak_rss_mb(),
    }


def measure_bundle(source: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    from edgeomni import Session

    began = perf_counter()
    session = Session.open(source, threads=THREADS)
    out: dict[str, Any] = {"load_s": perf_counter() - began}
    codes = forced_codes(work, session.spec.codec.codebook_size, session.spec.codec.streams)
    codes = codes[: options.get("codec_frames", CODEC_FRAMES)]
    for name, window in options.get("windows", {"30 s": 30}).items():
        out[name] = _turns(session, codes, window, work)
    out["peak_rss_mb"] = peak_rss_mb()
    if options.get("codec"):
        out["codec"] = _codec(session, codes)
    return out


def _turns(session: Any, codes: I64, window: float, work: Path) -> dict[str, Any]:
    from edgeomni import AudioChunk, TurnEnd

    samples, text_end = question(), min(TEXT_END, len(codes) // 2)
    ends: list[TurnEnd] = []
    for turn in range(WARMUP + TURNS):
        events = list(
            session.respond("aa", samples, encoder_window=window, forced_codes=codes, forced_text_end=text_end)
        )
        if turn >= WARMUP:
            ends.append(events[-1])
    np.save(work / "stream.npy", np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)]))
    frames = [e.spans.records["frame"] for e in ends]
    return {
        "first_audio_s": median(e.timings["ttfa"] for e in ends),
        "first_audio_all_s": [round(e.timings["ttfa"], 3) for e in ends],
        "mel_ms": spread([s for e in ends for s in e.spans.records["mel"]]),
        "encoder_ms": spread([s for e in ends for s in e.spans.records["encoder"]]),
        "prefill_ms": spread([s for e in ends for s in e.spans.records["prefill"]]),
        "frame_text_ms": spread([f for r in frames for f in r[2:text_end]]),
        "frame_after_ms": spread([f for r in frames for f in r[text_end + 2 :]]),
        "codec_frame_ms": float(np.median([sum(e.spans.records["codec"]) for e in ends]) / len(codes) * 1e3),
        "rtf": median(e.timings["rtf"] for e in ends),
        "rtf_turn": median(e.timings["rtf_turn"] for e in ends),
        "audio_s": ends[0].timings["audio"],
    }


def _codec(session: Any, codes: I64) -> dict[str, Any]:
    """Exact streaming in 4-frame pushes against one offline decode, turn about, per codec frame."""
    codec, spec = session.components.codec, session.spec.codec
    streamed, offline = [], []
    for _ in range(TURNS + WARMUP):
        for pushes, times in (([CODEC_PUSH] * -(-len(codes) // CODEC_PUSH), streamed), ([len(codes)], offline)):
            times.append(_decode(codec, spec, codes, pushes) / len(codes))
    return {"streamed_ms": spread(streamed[WARMUP:]), "offline_ms": spread(offline[WARMUP:])}


def _decode(codec: Any, spec: Any, codes: I64, pushes: list[int]) -> float:
    from edgeomni.tokens import frames_to_codes

    began, state, at = perf_counter(), codec.open(), 0
    for n in pushes:
        codec.decode(frames_to_codes(codes[at : at + n], spec), state, at + n >= len(codes))
        at += n
    return perf_counter() - began


if __name__ == "__main__":
    kind, source, work, *rest = sys.argv[1:]
    measure = {"torch": measure_torch, "bundle": measure_bundle}[kind]
    print(json.dumps(measure(Path(source), Path(work), json.loads(rest[0]) if rest else {})))
