"""The speech encoder and the codec as GGUF on ggml against torch and ONNX Runtime, at Mini-Omni's shape.

    python benchmarks/gguf_parts.py [--part encoder|codec] [--threads 2] [--seconds 60] [--work DIR]

Random weights; one process; the engines take turns, so that what else the machine does falls on all alike. The encoder
is given its whole window of 30 s; the codec pushes of 4 codec frames (0.34 s of sound) in the middle of a stream, noise
off, torch the same four frames offline with its weight norm folded. Prints a table and one line of JSON: medians and
p95 in milliseconds, ratios to torch's median of the same run, and how far the results are from torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measure import spread

from edgeomni.exporters import exporter_of, options_of
from edgeomni.model import presets
from edgeomni.runtimes.ggml.codec import GgmlCodec
from edgeomni.runtimes.ggml.encoder import GgmlEncoder
from edgeomni.runtimes.onnxruntime.codec import OrtCodec
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory

ENCODERS = ("gguf:fp32", "gguf:f16", "gguf:bf16", "gguf:q8_0", "onnx:fp32", "onnx:int8")
CODECS = ("gguf:fp32", "gguf:f16", "onnx:fp32", "onnx:fp16")
FRAMES, PUSHES = 4, 12
Run = Callable[[], Any]


def model_of_parts() -> Any:
    """Mini-Omni's encoder, adapter and codec; its body is cut to one narrow block, which nothing here runs."""
    full = presets.PRESETS["mini-omni"]
    presets.PRESETS["parts"] = replace(full, body=replace(full.body, layers=1, ffn=64), text_words=448)
    return presets.preset("parts")


def opened(model: Any, name: str, wanted: str, work: Path, threads: int) -> Any:
    """The component on its engine."""
    format_, _, precision = wanted.partition(":")
    out = work / wanted.replace(":", "-")
    component = exporter_of(format_).export(model, name, out, precision, options_of(format_, {}))
    if format_ == "gguf":
        return {"encoder": GgmlEncoder, "codec": GgmlCodec}[name](out, component, model.spec, threads)
    return {"encoder": OrtEncoder, "codec": OrtCodec}[name](out, component, model.spec, SessionFactory(threads))


def measured(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Each run's times, taken in turns after one round to warm up, for about so many seconds."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = perf_counter()
    while perf_counter() - start < seconds or len(next(iter(times.values()))) < 3:
        for name, run in runs.items():
            begun = perf_counter()
            run()
            times[name].append(perf_counter() - begun)
    return times


def encoders(model: Any, work: Path, threads: int, seconds: float, wanted: tuple[str, ...]) -> dict[str, Any]:
    n_mels, frames = model.spec.front_end.n_mels, 2 * model.spec.encoder.context
    mel = (np.random.default_rng(0).standard_normal((n_mels, frames)) * 0.5).astype(np.float32)

    def on_torch() -> Any:
        with torch.inference_mode():
            return model.encode(torch.from_numpy(mel)[None])[0].numpy()

    reference = on_torch()
    engines = {name: opened(model, "encoder", name, work, threads) for name in wanted}
    runs: dict[str, Run] = {"torch:fp32": on_torch}
    runs |= {name: (lambda e=engine: e.encode(mel)) for name, engine in engines.items()}
    far = {name: {"cosine": cosine(reference, run())} for name, run in runs.items()}
    return told("encoder, 30 s", measured(runs, seconds), far)


def codecs(model: Any, work: Path, threads: int, seconds: float, wanted: tuple[str, ...]) -> dict[str, Any]:
    folded(model.codec)
    spec, rng = model.spec.codec, np.random.default_rng(1)
    codes = [rng.integers(0, spec.codebook_size, FRAMES * PUSHES * n) for n in spec.ids_per_level]
    parts = [
        [c[i * FRAMES * n : (i + 1) * FRAMES * n] for c, n in zip(codes, spec.ids_per_level, strict=True)]
        for i in range(PUSHES)
    ]
    tensors = [torch.from_numpy(c)[None] for c in parts[1]]

    def on_torch() -> Any:
        with torch.inference_mode():
            return model.decode_codes(tensors)

    with torch.inference_mode():
        reference = model.decode_codes([torch.from_numpy(c)[None] for c in codes]).numpy()
    engines = {name: opened(model, "codec", name, work, threads) for name in wanted}
    far = {"torch:fp32": {"snr_db": float("inf")}}
    runs: dict[str, Run] = {"torch:fp32": on_torch}
    for name, engine in engines.items():
        state = engine.open()
        wave = np.concatenate([engine.decode(part, state, i + 1 == PUSHES) for i, part in enumerate(parts)])
        far[name] = {"snr_db": snr(reference, wave)}
        stream = engine.open()
        engine.decode(parts[0], stream, False)
        runs[name] = lambda e=engine, s=stream: e.decode(parts[1], s, False)
    return told(f"codec, {FRAMES} frames", measured(runs, seconds), far)


def folded(codec: Any) -> None:
    """Weight norm computed once and for all, as no deployed decoder would compute it every time."""
    for module in codec.modules():
        with suppress(ValueError):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")


def told(title: str, times: dict[str, list[float]], far: dict[str, Any]) -> dict[str, Any]:
    base = median(times["torch:fp32"])
    out = {
        name: {
            "ms": spread(taken),
            "of_torch": round(median(taken) / base, 3),
            "best_of_torch": round(min(taken) / min(times["torch:fp32"]), 3),
            **far[name],
        }
        for name, taken in times.items()
    }
    print(f"{title:20s}{'median ms':>12s}{'p95':>10s}{'x torch':>9s}{'best x':>9s}")
    for name, found in out.items():
        rest = ", ".join(f"{k} {v:.6g}" for k, v in far[name].items())
        print(
            f"{name:20s}{found['ms']['median']:12.1f}{found['ms']['p95']:10.1f}{found['of_torch']:9.3f}"
            f"{found['best_of_torch']:9.3f}  {rest}",
            flush=True,
        )
    return out


def cosine(a: Any, b: Any) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def snr(signal: Any, other: Any) -> float:
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(signal - other).sum(), 1e-30)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("encoder", "codec"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--engines", help="FORMAT:PRECISION,... [default: all]")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = model_of_parts()
    out: dict[str, Any] = {"threads": given.threads, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for part, measure, default in (("codec", codecs, CODECS), ("encoder", encoders, ENCODERS)):
            if given.part in (None, part):
                wanted = tuple(given.engines.split(",")) if given.engines else default
                out[part] = measure(model, work, given.threads, given.seconds, wanted)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
