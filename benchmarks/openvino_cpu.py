"""OpenVINO against ONNX Runtime on this CPU, in one process and in turn: encoder, prefill, frames, heads, codec, turns.

    python benchmarks/openvino_cpu.py WORK [--preset mini-omni] [--precision int4] [--rounds 5] [--threads 2]

Random weights of the preset's shape are exported to WORK/onnx and WORK/openvino (kept for the next run; without the
gate, which random weights would take long for and which the tests ask of small models). Each round measures each figure
once on one engine and then on the other, so that what else the machine does meets both. Turns answer a question of 5 s
with 117 codec frames, text ended after 40: all ONNX, all OpenVINO, and ONNX with OpenVINO's encoder or codec alone.
The last line is one JSON object: medians and p95 in ms, and ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from measure import CODEC_FRAMES, TEXT_END, question, spread

from edgeomni import Session, TurnEnd
from edgeomni.bundle import Bundle, Manifest, write_manifest
from edgeomni.components import Components, Features, OpenOptions
from edgeomni.exporters import exporter_of
from edgeomni.generate import prefill
from edgeomni.prompts import build
from edgeomni.quantize.policy import component_precisions
from edgeomni.runtimes import open_components
from edgeomni.sampling import Sampling
from edgeomni.spec import OmniSpec

FORMATS = ("onnx", "openvino")
STEPS = 20
"""Frames, heads and pushes measured in a row each time."""

Figures = dict[str, dict[str, list[float]]]


def export(work: Path, preset: str, precision: str) -> None:
    """Both bundles, of the same random model, where they are not there yet."""
    missing = [name for name in FORMATS if not (work / name / "bundle.json").is_file()]
    if not missing:
        return
    from edgeomni.model import checkpoints

    model = checkpoints.preset(preset, 0)
    for format_ in missing:
        shutil.rmtree(work / format_, ignore_errors=True)
        began = perf_counter()
        parts = {
            name: exporter_of(format_).export(model, name, work / format_, chosen)
            for name, chosen in component_precisions(precision).items()
        }
        write_manifest(work / format_, Manifest(model.spec, parts, None, {"weights": "random"}, {}, gate={}))
        print(f"{format_}: exported in {perf_counter() - began:.0f} s", flush=True)


class Side:
    """One engine's components, and what is measured of them."""

    def __init__(self, path: Path, threads: int) -> None:
        began = perf_counter()
        bundle = Bundle.open(path, hashes=False)
        self.spec, self.mb = bundle.spec, bundle.size / 1e6
        self.parts: Components = open_components(bundle, OpenOptions(threads))
        self.load_s = perf_counter() - began

    def measured(self) -> Iterator[tuple[str, float]]:
        """(figure, seconds), each figure's first measurement left to the warm-up round."""
        spec, parts, rng = self.spec, self.parts, np.random.default_rng(0)
        mel = rng.standard_normal((spec.front_end.n_mels, 2 * spec.encoder.context)).astype(np.float32)
        with clocked() as took:
            features = parts.encoder.encode(mel, 251)
        yield "encoder, 30 s window", took[0]
        prompt = build(spec, "aa", features=len(features), two_row=True)
        state = parts.llm.start(2, prompt.length + 4 * STEPS)
        with clocked() as took:
            hidden = prefill(parts.llm, prompt.ids, [Features(prompt.feature_start, features)], state)
        yield "prefill, 5 s question", took[0]
        yield from self._frames(hidden, state, rng)
        yield from self._pushes(rng)

    def _frames(self, hidden: Any, state: Any, rng: np.random.Generator) -> Iterator[tuple[str, float]]:
        llm = self.parts.llm
        for name, call in (
            ("text head", lambda: llm.text_logits(hidden, 1)),
            ("audio heads", lambda: llm.audio_logits(hidden, 0)),
        ):
            for _ in range(STEPS):
                yield name, timed(call)
        for rows in (2, 1):
            ids = random_ids(self.spec, rows, rng)
            for _ in range(STEPS):
                yield f"body, {rows} row(s)", timed(lambda ids=ids: llm.forward(ids, (), state))
            if rows == 2:
                llm.drop(state, 1)

    def _pushes(self, rng: np.random.Generator) -> Iterator[tuple[str, float]]:
        codec, spec = self.parts.codec, self.spec.codec
        state = codec.open()

        def push(frames: int) -> float:
            codes = [rng.integers(0, spec.codebook_size, frames * n) for n in spec.ids_per_level]
            return timed(lambda: codec.decode(codes, state, False))

        yield "codec, first push of 3 frames", push(codec.first_push)
        for _ in range(STEPS):
            yield "codec, push of 4 frames", push(4)


def random_ids(spec: OmniSpec, rows: int, rng: np.random.Generator) -> np.ndarray:
    layout = spec.layout
    audio = [rng.integers(0, layout.audio_vocab, (rows, 1)) + layout.shift(k) for k in range(layout.streams)]
    return np.stack([*audio, rng.integers(0, layout.text_vocab, (rows, 1))], 1).astype(np.int32)


@contextmanager
def clocked() -> Iterator[list[float]]:
    took: list[float] = []
    began = perf_counter()
    yield took
    took.append(perf_counter() - began)


def timed(call: Callable[[], Any]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def turn(session: Session) -> dict[str, float]:
    codec = session.spec.codec
    codes = np.random.default_rng(7).integers(0, codec.codebook_size, (CODEC_FRAMES, codec.streams))
    forced = {"forced_codes": codes, "forced_text_end": TEXT_END}
    *_, end = session.respond("aa", audio=question(), sampling=Sampling(greedy=True), **forced)
    assert isinstance(end, TurnEnd)
    frames = end.spans.records["frame"]
    return {"first audio": end.timings["ttfa"], "RTF": end.timings["rtf"], "frame": float(np.median(frames))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", default="mini-omni")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    export(given.work, given.preset, given.precision)
    sides = {name: Side(given.work / name, given.threads) for name in FORMATS}
    onnx, ov = (sides[name].parts for name in FORMATS)
    mixes = {
        "onnx": onnx,
        "openvino": ov,
        "openvino encoder": Components(ov.encoder, onnx.llm, onnx.codec),
        "openvino codec": Components(onnx.encoder, onnx.llm, ov.codec),
    }
    sessions = {name: Session(parts, sides["onnx"].spec, None) for name, parts in mixes.items()}
    figures: Figures = defaultdict(lambda: defaultdict(list))
    for round_ in range(given.rounds + 1):  # the first is the warm-up
        for name, side in sides.items():
            for figure, seconds in side.measured():
                if round_:
                    figures[figure][name].append(seconds)
        for name, session in sessions.items():
            for figure, value in turn(session).items():
                if round_:
                    figures[f"turn: {figure}"][name].append(value / 1e3 if figure == "RTF" else value)
    report = tell(figures)
    facts = {name: {"load_s": side.load_s, "mb": side.mb} for name, side in sides.items()}
    print(json.dumps({"threads": given.threads, "precision": given.precision, "bundles": facts, "figures": report}))


def tell(figures: Figures) -> dict[str, Any]:
    """Prints a table and returns it: per figure and engine median and p95 (ms; RTF as it is), and ratios to ONNX."""
    report: dict[str, Any] = {}
    for figure, by_engine in figures.items():
        row: dict[str, Any] = {name: spread(values) for name, values in by_engine.items()}
        base = row["onnx"]["median"]
        row["ratio"] = {name: row[name]["median"] / base for name in by_engine if name != "onnx"}
        report[figure] = row
        shown = ", ".join(f"{n} {row[n]['median']:.4g} (p95 {row[n]['p95']:.4g})" for n in by_engine)
        print(f"{figure:32s} {shown}; ratio {', '.join(f'{r:.2f}' for r in row['ratio'].values())}", flush=True)
    return report


if __name__ == "__main__":
    main()
