"""Would 8-bit activations make an encoder faster in OpenVINO on this CPU? Blocks of Whisper small's size, three ways.

    python benchmarks/openvino_w8a8.py [--blocks 2] [--rounds 5]

Linear layers in float32, with 8-bit weights alone, and with 8-bit weights and activations (FakeQuantize, ranges fixed
beforehand), for a window of 1500 positions with attention, one thread. Processor time in ms, smallest and median. Only
the time is asked here: the weights are random, and the ranges are not calibrated.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import process_time
from typing import Any

import numpy as np

from edgeomni.exporters.openvino.graph import Graph, Value, ops
from edgeomni.quantize.schemes import Packed, Scheme, quantize
from edgeomni.runtimes.openvino.models import ModelFactory, core

POSITIONS, WIDTH, FFN, HEADS = 1500, 768, 3072, 12
KINDS = {"float32": "fp32", "8-bit weights": "int8", "8-bit weights and activations": "int8"}
REACH = 5.0
"""Activations of unit variance lie within."""


class Blocks:
    """`count` transformer blocks with random weights; the layers' inputs are rounded to 8 bits where asked for."""

    def __init__(self, count: int, precision: str, rounded: bool) -> None:
        self.graph, self.rounded = Graph("blocks"), rounded
        self.scheme = Scheme("fp32") if precision == "fp32" else Scheme("int8", WIDTH)
        self.rng = np.random.default_rng(0)
        x: Value = self.graph.input("x", np.float32, [1, POSITIONS, WIDTH])
        for i in range(count):
            x = self._block(x, f"{i}")
        self.graph.output("y", x)

    def _block(self, x: Value, at: str) -> Value:
        g = self.graph
        parts = g.split(self._linear(self._norm(x), f"{at}.qkv", 3 * WIDTH), [WIDTH] * 3, axis=2)
        attended = ops.scaled_dot_product_attention(*(g.heads(part, HEADS, WIDTH // HEADS) for part in parts))
        x = ops.add(x, self._linear(g.joined(attended, WIDTH), f"{at}.out", WIDTH))
        inner = ops.gelu(self._linear(self._norm(x), f"{at}.fc1", FFN), "erf")
        return ops.add(x, self._linear(inner, f"{at}.fc2", WIDTH, FFN))

    def _norm(self, x: Value) -> Value:
        return ops.mvn(x, self.graph.ints(-1), True, 1e-5, "inside_sqrt")

    def _linear(self, x: Value, name: str, n: int, k: int = WIDTH) -> Value:
        if self.rounded:
            low, high = self.graph.number(-REACH), self.graph.number(REACH - 2 * REACH / 256)
            x = ops.fake_quantize(x, low, high, low, high, 256)
        return self.graph.linear(x, name, self._weight(n, k))

    def _weight(self, n: int, k: int) -> Packed:
        scheme = self.scheme if self.scheme.kind == "fp32" else Scheme("int8", k)  # one scale per output
        return quantize(self.rng.standard_normal((n, k)).astype(np.float32) / np.float32(k**0.5), scheme)


def compiled(blocks: int) -> dict[str, Any]:
    factory = ModelFactory(1)
    built = {
        name: Blocks(blocks, kind, name == "8-bit weights and activations").graph.model()
        for name, kind in KINDS.items()
    }
    return {name: core().compile_model(model, factory.device, factory.properties) for name, model in built.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    models = compiled(given.blocks)
    x = np.random.default_rng(1).standard_normal((1, POSITIONS, WIDTH)).astype(np.float32)
    took: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(given.rounds + 1):  # the first is the warm-up
        for name, model in models.items():
            began = process_time()
            model([x])
            if round_:
                took[name].append(1e3 * (process_time() - began))
    for name, values in took.items():
        print(f"{name:32s} {min(values):6.0f} {median(values):6.0f}")


if __name__ == "__main__":
    main()
