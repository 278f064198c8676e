"""The LLM in GGUF at the real shape, against llama.cpp's own way: python benchmarks/gguf_llm.py [WORK] [--rounds N].

One run makes the random model of the preset mini-omni, exports its LLM, writes two files of the kind that llama.cpp's
users have (a monolithic model whose tied table holds all 181120 rows, and a plain Qwen2-0.5B shape of 151936 rows), and
measures all in one process, turn about. Then every measurement of memory in a process of its own. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import numpy as np
from llama_cpp_alone import PEER_ROWS, PROMPT, THREADS, PeerTurn, Whole, WholeTurn, write_whole

WARMUP, FRAMES, GREEDY = 4, 30, 300
PRECISIONS = ("q4_0", "q8_0", "f16", "q4_k_m")


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median and p95."""
    ms = np.array(seconds) * 1e3
    return {"median": round(float(np.median(ms)), 3), "p95": round(float(np.percentile(ms, 95)), 3), "n": len(ms)}


# --- files


def prepare(work: Path) -> None:
    """Exports the preset's LLM in every precision; q4_0 in two bundles, whose other components are ONNX or GGUF."""
    from edgeomni.exporters import exporter_of
    from edgeomni.model import checkpoints

    model = checkpoints.preset("mini-omni", 0)
    for precision in PRECISIONS:
        llm = exporter_of("gguf").export(model, "llm", work / precision, precision)
        (work / precision / "component.json").write_text(json.dumps({"scheme": llm.scheme, "meta": llm.meta}))
        if precision == "q4_0":
            _bundle(model, work / "q4_0", llm, encoder="onnx:int8", codec="onnx:fp32")
            again = exporter_of("gguf").export(model, "llm", work / "all", precision)
            _bundle(model, work / "all", again, encoder="gguf:q8_0", codec="gguf:f16")


def _bundle(model: Any, root: Path, llm: Any, **others: str) -> None:
    """A bundle that was not judged: random weights, and the gate takes minutes at this size."""
    from edgeomni.bundle import Manifest, write_manifest
    from edgeomni.exporters import exporter_of, options_of

    components = {"llm": llm}
    for name, chosen in others.items():
        kind, _, precision = chosen.partition(":")
        components[name] = exporter_of(kind).export(model, name, root, precision, options_of(kind, {}))
    write_manifest(root, Manifest(model.spec, components, None, {"weights": "random"}, {}, gate={}))


# --- turns


class Turn:
    """A two-row turn of the split model, greedy; `frame` is one step of the loop as generate.py does it."""

    def __init__(self, llm: Any, spec: Any, ids: Any) -> None:
        self.llm, self.layout = llm, spec.layout
        self.state = llm.start(2, PROMPT + GREEDY + 100)
        hidden = llm.forward(ids[:1, :, :-1].copy(), (), self.state)
        llm.fork(self.state)
        hidden = llm.forward(ids[:, :, -1:].copy(), (), self.state)
        self.rows, self.audio, self.text = 2, self._audio(hidden), int(llm.text_logits(hidden, 1).argmax())

    def _audio(self, hidden: Any) -> Any:
        return self.llm.audio_logits(hidden, 0).argmax(-1)

    def frame(self) -> None:
        from edgeomni.generate import next_ids

        hidden = self.llm.forward(next_ids(self.layout, self.audio, self.text, self.rows), (), self.state)
        self.audio = self._audio(hidden)
        if self.rows == 2:
            self.text = int(self.llm.text_logits(hidden, 1).argmax())

    def end_text(self) -> None:
        self.llm.drop(self.state, 1)
        self.rows = 1


def timed(step: Callable[[], None], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = perf_counter()
        step()
        times.append(perf_counter() - began)
    return times


def bandwidth() -> float:
    """GB/s that THREADS threads read together: each the dot product of its own 256 MB with itself, best of five."""
    arrays = [np.ones(64 << 20, np.float32) for _ in range(THREADS)]
    best = 0.0
    for _ in range(5):
        threads = [Thread(target=lambda a=a: np.dot(a, a)) for a in arrays]
        began = perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(a.nbytes for a in arrays) / (perf_counter() - began) / 1e9)
    return best


def opened(work: Path, precision: str) -> Any:
    from edgeomni.bundle import Bundle, Component, GraphEntry
    from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel

    spec = Bundle.open(work / "q4_0", hashes=False).spec
    told = json.loads((work / precision / "component.json").read_text())
    graphs = {role: GraphEntry(f"llm/{role}.gguf") for role in ("body", "heads")}
    component = Component("llm", "llama.cpp", "gguf", precision, told["scheme"], graphs, told["meta"])
    return LlamaLanguageModel(work / precision, component, spec, THREADS), spec


def prompt(spec: Any) -> Any:
    rng, layout = np.random.default_rng(1), spec.layout
    audio = [rng.integers(0, layout.codebook_size, (1, PROMPT)) + layout.shift(k) for k in range(layout.streams)]
    ids = np.stack([*audio, rng.integers(0, 1000, (1, PROMPT))], 1).astype(np.int32)
    ids = np.repeat(ids, 2, axis=0)
    ids[1, -1, -1] = 5
    return ids


def measure(work: Path, rounds: int) -> dict[str, Any]:
    """Frames of the split model and of llama.cpp's two, turn about."""
    llm, spec = opened(work, "q4_0")
    ids, width = prompt(spec), spec.body.width
    monolithic, peer = (Whole(work / f"{name}.gguf", width, like_ours=False) for name in ("monolithic", "peer"))
    names = ("two_rows", "one_row", "monolithic_two_rows", "peer_one_row")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        turn, whole, plain = Turn(llm, spec, ids), WholeTurn(monolithic, llm, spec, ids), PeerTurn(peer)
        steps = {"two_rows": turn.frame, "monolithic_two_rows": whole.frame, "peer_one_row": plain.frame}
        for name, step in steps.items():
            timed(step, WARMUP)
            times[name] += timed(step, FRAMES)
        turn.end_text()
        timed(turn.frame, WARMUP)
        times["one_row"] += timed(turn.frame, FRAMES)
    out: dict[str, Any] = {name: spread(values) for name, values in times.items()}
    median = {name: out[name]["median"] for name in names}
    out["two_rows_ratio"] = median["two_rows"] / median["monolithic_two_rows"]
    out["one_row_ratio"] = median["one_row"] / median["monolithic_two_rows"]
    out["one_row_to_peer_ratio"] = median["one_row"] / median["peer_one_row"]
    return out


def greedy(work: Path) -> dict[str, Any]:
    """Tokens of the split and of the monolithic model, each fed its own, until they part."""
    llm, spec = opened(work, "q4_0")
    ids, same = prompt(spec), 0
    monolithic = Whole(work / "monolithic.gguf", spec.body.width, like_ours=True)
    turn, whole = Turn(llm, spec, ids), WholeTurn(monolithic, llm, spec, ids)
    for _ in range(GREEDY):
        if turn.text != whole.text or not np.array_equal(turn.audio, whole.audio):
            break
        same += 1
        turn.frame(), whole.frame()
    return {"frames": GREEDY, "identical": same}


def precision(work: Path, name: str) -> dict[str, Any]:
    """Frames of one precision: two rows in one call and in two, one row, the blocks alone; bandwidth for f16."""
    llm, spec = opened(work, name)
    ids, out = prompt(spec), {}
    for together in (True, False):
        llm._together = together
        turn = Turn(llm, spec, ids)
        timed(turn.frame, WARMUP)
        out["two_rows_one_call" if together else "two_rows_two_calls"] = spread(timed(turn.frame, FRAMES))
    turn.end_text()
    timed(turn.frame, WARMUP)
    out["one_row"] = spread(timed(turn.frame, FRAMES))
    context, embeds = turn.state.caches[0], np.zeros((1, 1, spec.body.width), np.float32)
    at = iter(range(turn.state.length, turn.state.length + 1000))
    body = timed(lambda: context.append(embeds, next(at), None, together=True), FRAMES)
    out["body_one_row"] = spread(body)
    began, state = perf_counter(), llm.start(1, PROMPT + 8)
    for start in range(0, 192, 64):
        llm.forward(ids[:1, :, start : start + 64].copy(), (), state)
    out["prefill_tokens_per_s"] = 192 / (perf_counter() - began)
    size = (work / name / "llm" / "body.gguf").stat().st_size
    read = bandwidth()
    out["bandwidth_gb_s"], out["body_gb_s"] = read, size / out["body_one_row"]["median"] / 1e6
    out["bandwidth_share"] = out["body_gb_s"] / read
    out["files_mb"] = sum(f.stat().st_size for f in (work / name / "llm").glob("*.gguf")) / 1e6
    return out


def memory(work: Path, what: str) -> dict[str, Any]:
    """Peak resident memory of a turn: of the LLM alone, or of a whole session on one of the two bundles."""
    if what == "llm":
        llm, spec = opened(work, "q4_0")
        turn = Turn(llm, spec, prompt(spec))
        timed(turn.frame, FRAMES)
    else:
        from edgeomni import Session

        samples = np.random.default_rng(0).standard_normal(5 * 16000).astype(np.float32) * 0.1
        with Session.open(work / what, threads=THREADS) as session:
            codes = np.random.default_rng(7).integers(0, 4096, (117, 7))
            list(session.respond("aa", samples, forced_codes=codes, forced_text_end=40))
    status = Path("/proc/self/status").read_text().splitlines()
    return {"peak_rss_mb": next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM"))}


def child(work: Path, *words: str) -> Any:
    """Runs this file on one step in a process of its own; its last line is the result."""
    command = [sys.executable, __file__, str(work), "--step", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-600:]}
    return json.loads(done.stdout.splitlines()[-1])


def run(work: Path, rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    steps = [("prepare",), ("files",), ("measure", str(rounds)), ("greedy",), ("memory", "llm")]
    steps += [("memory", "q4_0"), ("memory", "all")]
    for words in [*steps, *(("precision", name) for name in PRECISIONS)]:
        began = perf_counter()
        if words[0] == "prepare" and (work / "q4_0" / "bundle.json").is_file():
            continue
        out[" ".join(words)] = child(work, *words)
        print(words, round(perf_counter() - began, 1), "s", json.dumps(out[" ".join(words)]), flush=True)
    return out


def step(work: Path, name: str, *words: str) -> Any:
    if name == "prepare":
        return prepare(work)
    if name == "files":
        write_whole(work / "monolithic.gguf", work / "q4_0", 181120)
        return write_whole(work / "peer.gguf", work / "q4_0", PEER_ROWS)
    steps: dict[str, Callable[..., Any]] = {
        "measure": lambda rounds: measure(work, int(rounds)),
        "greedy": lambda: greedy(work),
        "precision": lambda which: precision(work, which),
        "memory": lambda what: memory(work, what),
    }
    return steps[name](*words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="?", default="/tmp/edgeomni-gguf-llm", type=Path)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--step", nargs="+")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result = step(options.work, *options.step) if options.step else run(options.work, options.rounds)
    print(json.dumps(result))
