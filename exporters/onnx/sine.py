"""sin(x)^2 as ONNX Runtime's CPU provider computes it fastest: with a polynomial.

Its Sin kernel runs on one thread, takes 2 ns per value, and used 45 % of SNAC's decoder's time. Add and Mul use all
threads and wide registers, so a polynomial is faster: with u = x / pi and f = u - round(u) in [-1/2, 1/2],
    sin(x)^2 = sin(pi f)^2,  sin(pi f) = f (C0 + C1 f^2 + ... + C4 f^8)  to 3.4e-9 (minimax).
The polynomial is computed divided by C4, so that its first coefficient is 1 and costs no multiplication; whoever uses
it folds C4 into a weight, as it does the factor 1 / pi.
"""

from __future__ import annotations

from edgeomni.exporters.onnx.graph import Graph

_C = (3.1415925800447417, -5.167706878927175, 2.5500313772909067, -0.5980451741744529, 0.07722012904167239)
"""One term less (error 6e-7) saves 8 % and cannot be heard, but costs 5 dB against the original on random weights."""
LEAD = _C[-1]
_ROUND = 1.5 * 2.0**23
"""Adding and subtracting it rounds a float32 to a whole number, in two fast passes where Round is a slow one."""


def monic_sine(g: Graph, u: str, *, by_round: bool = False) -> str:
    """sin(pi u) / LEAD, up to its sign; same shape as u. `by_round` takes the operator Round to find whole numbers."""
    f = g.op("Sub", [u, g.op("Round", [u]) if by_round else _rounded(g, u)])
    square = g.op("Mul", [f, f])
    y = square
    for i in reversed(range(len(_C) - 1)):
        y = g.op("Add", [y, g.floats(f"snake.c{i}", _C[i] / LEAD)])
        y = g.op("Mul", [y, square if i else f])
    return y


def _rounded(g: Graph, u: str) -> str:
    magic = g.floats("snake.round", _ROUND)
    return g.op("Sub", [g.op("Add", [u, magic]), magic])
