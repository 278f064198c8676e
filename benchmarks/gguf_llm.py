"""The LLM in GGUF at the real shape, against llama.cpp's own way: python benchmarks/gguf_llm.py [WORK] [--rounds N].

One run makes the random model of the preset mini-omni, exports its LLM, writes two files of the kind that llama.cpp's
users have (a monolithic model whose tied table holds all 181120 rows, and a plain Qwen2-0.5B shape of 151936 rows), and
measures all in one process, turn about. Then every measurement of memory in a process of its own. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import numpy as np

from edgeomni.arrays import F32

THREADS, PROMPT, WARMUP, FRAMES, GREEDY = 2, 200, 4, 30, 300
PEER_ROWS = 151936
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


def write_whole(path: Path, bundle: Path, rows: int) -> None:
    """A whole model of a bundle's body and of `rows` rows of its heads' table, tied: what llama.cpp runs by itself."""
    from gguf import GGUFReader, GGUFWriter

    body, heads = (GGUFReader(bundle / "llm" / f"{name}.gguf") for name in ("body", "heads"))
    architecture = body.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture)
    for key, field in body.fields.items():
        if key.startswith(architecture) and not key.endswith("vocab_size"):
            value = field.contents()
            {int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("none")
    tables = {tensor.name: tensor for tensor in heads.tensors}
    table = np.concatenate([np.asarray(tables[f"{part}_head.weight"].data) for part in ("text", "audio")])[:rows]
    writer.add_tensor("token_embd.weight", table, raw_dtype=tables["text_head.weight"].tensor_type)
    for tensor in body.tensors:
        if tensor.name != "token_embd.weight":
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- llama.cpp by itself


class Whole:
    """A whole model on llama.cpp alone: embeddings or a token id in, logits out.

    As llama.cpp sets up a context by itself, or `like_ours`: then its blocks compute to the bit what the split model's
    do, since batches and attention have the same shapes, and all that can differ are the heads.
    """

    def __init__(self, path: Path, width: int, *, like_ours: bool) -> None:
        from edgeomni.runtimes.llamacpp.body import BATCH
        from edgeomni.runtimes.llamacpp.library import llama

        self.llama = lib = llama()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = 2048, 2, THREADS, THREADS
        self.piece = BATCH if like_ours else 512
        params.n_batch = params.n_ubatch = self.piece
        if like_ours:
            params.kv_unified, params.flash_attn_type = True, 0
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory, self.width = lib.llama_get_memory(self.context), width
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batches = {True: lib.llama_batch_init(512, width, 1), False: lib.llama_batch_init(512, 0, 1)}

    def fill(self, embeds: F32) -> None:
        """A prompt [t, D] in both rows."""
        self.llama.llama_memory_clear(self.memory, True)
        for first in range(0, len(embeds), self.piece):
            part = embeds[first : first + self.piece]
            self.decode(part, range(first, first + len(part)), [0] * len(part), outputs=False)
        self.llama.llama_memory_seq_cp(self.memory, 0, 1, -1, -1)

    def decode(self, given: Any, positions: Any, rows: Any, outputs: bool = True) -> list[F32]:
        """One call; `given` is float32 [n, D] or ids [n]. Returns the logits of each, views until the next call."""
        embeds = getattr(given, "ndim", 1) == 2
        batch = self.batches[embeds]
        batch.n_tokens = len(rows)
        if embeds:
            flat = np.ascontiguousarray(given, np.float32)
            ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
        for i, (position, row) in enumerate(zip(positions, rows, strict=True)):
            if not embeds:
                batch.token[i] = int(given[i])
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, row, outputs
        if status := self.llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        if not outputs:
            return []
        pointers = [self.llama.llama_get_logits_ith(self.context, i) for i in range(len(rows))]
        return [np.ctypeslib.as_array(pointer, shape=(self.vocab,)) for pointer in pointers]


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


class WholeTurn:
    """The same turn on the monolithic model: every frame is one decode of two rows, all logits read."""

    def __init__(self, whole: Whole, llm: Any, spec: Any, ids: Any) -> None:
        self.whole, self.llm, self.layout, self.at = whole, llm, spec.layout, PROMPT
        embeds = llm.embed(ids)
        whole.fill(embeds[0, :-1])
        self._choose(whole.decode(embeds[:, -1], [PROMPT - 1] * 2, [0, 1]))

    def _choose(self, logits: list[F32]) -> None:
        text, streams = self.layout.text_vocab, self.layout.streams
        self.audio = logits[0][text:].reshape(streams, -1).argmax(-1)
        self.text = int(logits[1][:text].argmax())

    def frame(self) -> None:
        from edgeomni.generate import next_ids

        embeds = self.llm.embed(next_ids(self.layout, self.audio, self.text, 2))[:, 0]
        self._choose(self.whole.decode(embeds, [self.at] * 2, [0, 1]))
        self.at += 1


class PeerTurn:
    """Plain text decoding of a Qwen2-0.5B shape: one token id in, 151936 logits out."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.at, self.token = whole, PROMPT, 7
        whole.fill(np.random.default_rng(0).standard_normal((PROMPT, whole.width)).astype(np.float32) * 0.05)

    def frame(self) -> None:
        self.token = int(self.whole.decode([self.token], [self.at], [0])[0].argmax())
        self.at += 1


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
