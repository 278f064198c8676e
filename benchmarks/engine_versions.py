"""Does a bundle answer the same on another version of its engine?

python benchmarks/engine_versions.py BUNDLE PYTHON_A PYTHON_B

Each interpreter needs EdgeOmni's device dependencies (no torch) with its own version of ONNX Runtime. Both answer the
same questions greedily in processes of their own. B then answers again while it is fed what A's encoder and A's heads
gave (teacher forcing), so that every frame of the two can be compared on the same input. The yardstick is A itself,
fed the same once more with the encoder's features shaken by what float32 rounds: a difference between the two versions
that is no larger than what this does to one version is rounding, and no defect.

Prints a table and, as its last line, one JSON object. Exits with 1 where the versions differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Answers = list[dict[str, Array]]

QUESTIONS = (("aa", 0), ("aa", 1), ("at", 2), ("asr", 3))
"""Task and seed of the synthetic question."""
SECONDS, FRAMES, FEATURES_PER_SECOND = 4.0, 160, 50
ULP = 2.0**-24
"""What rounding to float32 changes at most, relative to the value."""
LIMIT = 3.0
"""How many times A's own rounding noise the versions may differ by."""
FLOOR = 1e-5
"""Share of the logits' spread up to which no difference counts: float32's rounding in a single layer."""


def answers(bundle: str, known: Answers | None, shake: bool) -> Answers:
    """Answers every question; where `known` is given, the engine is fed its features and its choices instead."""
    from edgeomni import AudioChunk, Session, TurnEnd
    from edgeomni.gate.teacher_forcing import probe
    from edgeomni.sampling import Sampling

    session = Session.open(bundle, threads=1)
    out: Answers = []
    for number, (task, seed) in enumerate(QUESTIONS):
        tap = Tap(session.components, known[number] if known else None, shake)
        seconds = min(SECONDS, session.spec.context // 2 / FEATURES_PER_SECOND)
        question = probe(session.spec.front_end, seconds, seed)
        longest = min(session.spec.context, int(seconds * FEATURES_PER_SECOND) + FRAMES)
        events = list(session.respond(task, question, sampling=Sampling(greedy=True), max_length=longest))
        tap.remove()
        assert isinstance(end := events[-1], TurnEnd)
        wave = [e.samples for e in events if isinstance(e, AudioChunk)]
        out.append({**tap.heard(), "tokens": end.tokens, "wave": np.concatenate(wave) if wave else np.zeros(0)})
    session.close()
    return out


class Tap:
    """Stands in the way of three methods of the components: notes what they return, and passes on what is `known`.

    It is set on the objects and not on their classes, so that whatever the loop calls passes through it.
    """

    def __init__(self, components: Any, known: dict[str, Array] | None, shake: bool) -> None:
        self._known, self._shake = known, shake
        self._noted: dict[str, list[Array]] = {"features": [], "text": [], "audio": []}
        self._tapped: list[tuple[Any, str]] = []
        self._on(components.encoder, "encode", "features", self._features)
        self._on(components.llm, "text_logits", "text", chosen_alone)
        self._on(components.llm, "audio_logits", "audio", chosen_alone)

    def _on(self, owner: Any, method: str, name: str, instead: Callable[[Array], Array]) -> None:
        real, noted = getattr(owner, method), self._noted[name]

        def tapped(*args: Any, **kwargs: Any) -> Array:
            noted.append(np.array(real(*args, **kwargs), np.float32))
            return noted[-1] if self._known is None else instead(self._known[name][len(noted) - 1])

        setattr(owner, method, tapped)
        self._tapped.append((owner, method))

    def _features(self, values: Array) -> Array:
        if not self._shake:
            return values
        draw = np.random.default_rng(0).uniform(-ULP, ULP, values.shape)
        return (values * (1 + draw)).astype(np.float32)

    def heard(self) -> dict[str, Array]:
        return {name: np.stack(values) if values else np.zeros(0) for name, values in self._noted.items()}

    def remove(self) -> None:
        for owner, method in self._tapped:
            delattr(owner, method)


def chosen_alone(logits: Array) -> Array:
    """Logits [..., V] of which only the largest is above 0: whoever chooses greedily must choose it."""
    return (np.arange(logits.shape[-1]) == logits.argmax(-1)[..., None]).astype(np.float32)


def worker(bundle: str, out: str, known: str, shake: bool) -> None:
    """What runs in the interpreter that is examined."""
    import onnxruntime

    given = load(known)[0] if known else None
    flat = {f"{i}.{k}": v for i, a in enumerate(answers(bundle, given, shake)) for k, v in a.items()}
    about = {"onnxruntime": onnxruntime.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    np.savez(out, about=json.dumps(about), **flat)


def load(path: str) -> tuple[Answers, dict[str, str]]:
    with np.load(path) as arrays:
        about = json.loads(str(arrays["about"]))
        named = {k: arrays[k] for k in arrays.files if k != "about"}
    parts = ("features", "text", "audio", "tokens", "wave")
    return [{p: named[f"{i}.{p}"] for p in parts} for i in range(len(QUESTIONS))], about


def run(python: str, bundle: str, out: Path, known: Path | None = None, shake: bool = False) -> Path:
    """One worker process in the interpreter `python`, on this checkout's edgeomni."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), root) if p)
    command = [python, __file__, bundle, "--worker", str(out), *(["--known", str(known)] if known else [])]
    subprocess.run([*command, *(["--shake"] if shake else [])], check=True, env={**os.environ, "PYTHONPATH": path})
    return out


def heads(answer: dict[str, Array]) -> dict[str, Array]:
    """Head -> logits [N, V]."""
    audio = answer["audio"]
    streams = {f"audio{k}": audio[:, k] for k in range(audio.shape[1])} if audio.size else {}
    return {"text": answer["text"], **streams}


def compared(a: Answers, b: Answers, shaken: Answers) -> dict[str, dict[str, Any]]:
    """Head -> figures over all questions. Differences and margins are shares of the logits' spread (deviation)."""
    return {
        name: head_figures([[heads(x)[name] for x in side if name in heads(x)] for side in (a, b, shaken)])
        for name in heads(a[0])
    }


def head_figures(sides: Sequence[Sequence[Array]]) -> dict[str, Any]:
    a, b, shaken = (np.concatenate(side).astype(np.float64) for side in sides)
    spread = a.std()
    error, noise = (float(np.sqrt(np.mean((x - a) ** 2)) / spread) for x in (b, shaken))
    margins = a.max(-1) - np.take_along_axis(a, b.argmax(-1)[:, None], -1)[:, 0]
    turned = np.flatnonzero(a.argmax(-1) != b.argmax(-1))
    figures = {
        "positions": len(a),
        "rms": error,
        "largest": float(np.abs(b - a).max() / spread),
        "noise": noise,
        "excess": error / max(noise, FLOOR),
        "turned": len(turned),
        "turned_by_noise": int((a.argmax(-1) != shaken.argmax(-1)).sum()),
    }
    if len(turned):
        figures |= {"first_turned": int(turned[0]), "widest_margin": float(margins[turned].max() / spread)}
    return figures


def divergences(a: Answers, b: Answers) -> list[dict[str, Any] | None]:
    """Where two free answers part, per question; None where they are the same.

    `margin` is by how much A preferred its id to B's, `difference` the root mean square of how B's logits differ
    there; both are shares of the logits' spread.
    """
    return [divergence(x, y) for x, y in zip(a, b, strict=True)]


def divergence(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Any] | None:
    length = min(a["tokens"].shape[1], b["tokens"].shape[1])
    streams, frames = np.nonzero(a["tokens"][:, :length] != b["tokens"][:, :length])
    if not len(frames):
        return None if a["tokens"].shape == b["tokens"].shape else {"frame": length}
    frame = int(frames.min())
    stream = int(streams[frames == frame][0])
    name = "text" if stream == len(a["tokens"]) - 1 else f"audio{stream}"
    mine, theirs = (heads(side)[name][frame].astype(np.float64) for side in (a, b))
    margin = mine.max() - mine[b["tokens"][stream, frame]]
    difference = np.sqrt(np.mean((mine - theirs) ** 2))
    return {
        "frame": frame,
        "head": name,
        "margin": float(margin / mine.std()),
        "difference": float(difference / mine.std()),
    }


def relative(a: Answers, b: Answers, part: str) -> float:
    """Root mean square of the difference over that of `a`, all questions together."""
    pairs = [
        (x[part].astype(np.float64).ravel(), y[part].astype(np.float64).ravel()) for x, y in zip(a, b, strict=True)
    ]
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(other - one) / (np.linalg.norm(one) or 1))


def compare(bundle: str, pythons: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgeomni-versions-") as folder:
        work = Path(folder)
        first = run(pythons[0], bundle, work / "a.npz")
        (a, about_a), (free, about_b) = load(str(first)), load(str(run(pythons[1], bundle, work / "free.npz")))
        b = load(str(run(pythons[1], bundle, work / "b.npz", first)))[0]
        shaken = load(str(run(pythons[0], bundle, work / "shaken.npz", first, shake=True)))[0]
    figures = compared(a, b, shaken)
    return {
        "bundle": Path(bundle).name,
        "a": about_a,
        "b": about_b,
        "encoder": relative(a, b, "features"),
        "codec": relative(a, b, "wave"),
        "heads": figures,
        "frames": [x["tokens"].shape[1] for x in a],
        "divergences": divergences(a, free),
        "rounding_only": max(f["excess"] for f in figures.values()) <= LIMIT,
    }


def report(result: dict[str, Any]) -> None:
    a, b = result["a"], result["b"]
    print(f"{result['bundle']}: onnxruntime {a['onnxruntime']} against {b['onnxruntime']}")
    print(f"encoder features differ by {result['encoder']:.1e} of their size, the wave by {result['codec']:.1e}")
    for (task, _), frames, place in zip(QUESTIONS, result["frames"], result["divergences"], strict=True):
        print(f"{task}, {frames} frames, both answering freely: {place or 'the same ids throughout'}")
    print("head     positions    rms  largest   noise  excess  turned (by noise)  widest margin")
    for name, f in result["heads"].items():
        print(
            f"{name:8} {f['positions']:9} {f['rms']:.1e}  {f['largest']:.1e} {f['noise']:.1e}  {f['excess']:6.2f} "
            f"{f['turned']:7} ({f['turned_by_noise']:8})  {f.get('widest_margin', 0):.1e}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    parser.add_argument("--worker", metavar="OUT", help=argparse.SUPPRESS)
    parser.add_argument("--known", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shake", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.bundle, args.worker, args.known, args.shake)
        return 0
    if len(args.pythons) != 2:
        parser.error("give two interpreters to compare")
    result = compare(args.bundle, args.pythons)
    report(result)
    print(json.dumps(result))
    return int(not result["rounding_only"])


if __name__ == "__main__":
    sys.exit(main())
