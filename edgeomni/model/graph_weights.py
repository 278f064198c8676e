"""The weights in a graph that another tool exported of a model, found again under the model's own names.

Tracing exporters rename, transpose and share weights (two equal tensors are stored once), but they write the module
that an operation came from into the operation's name: `/layers.0/fc1/MatMul` in ONNX, `__module.layers.0.fc1/...` in
OpenVINO's format. So a weight is looked for where it is used, then by its own name, then, for what no module of its
own uses (a table of positions), as the only tensor of that shape that is left. Whether all were found rightly is told
by held_against in optimum_graphs.py, which runs the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..errors import CheckpointError
from .tensors import Shapes

Role = Literal["weight", "bias"]
_PREFIXES = ("", "model.", "encoder.", "model.encoder.")
"""What exporters put before the names of an encoder's or a body's modules."""
_NAMED_AT_MOST = 8
_REMEDY = (
    "graphs that were optimised (--optimize) or made by other exporters cannot be read: export it again with "
    "`optimum-cli export` and no such option, or give the model's original directory"
)


@dataclass(frozen=True)
class Use:
    """Where a graph reads a constant: the dotted path of the module, and as what. `flipped`: a matrix as [in, out]."""

    scope: str
    role: Role
    flipped: bool = False


@dataclass(frozen=True)
class Constant:
    """A tensor of a graph; `read` gives it as float32."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    read: Callable[[], Tensor]


def found(graph: Path, constants: Iterable[Constant], expected: Shapes) -> dict[str, Tensor]:
    """The tensors of the expected names, in the expected shapes. Raises CheckpointError that names those not found."""
    index = _Index(constants)
    places = {name: place for name, shape in expected.items() if (place := index.place(name, shape))}
    taken = {id(place[0]) for place in places.values()}
    for name, shape in expected.items():
        if name not in places and (last := index.only_one_left(shape, taken)):
            places[name] = last
    if missing := [f"{name} {shape}" for name, shape in expected.items() if name not in places]:
        more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        raise CheckpointError(
            f"{graph}: holds no tensor that could be {', '.join(missing[:_NAMED_AT_MOST])}{more}; {_REMEDY}"
        )
    return {name: _read(place, expected[name]) for name, place in places.items()}


_Place = tuple[Constant, bool]
"""A constant, and whether it is the transposed matrix."""


class _Index:
    def __init__(self, constants: Iterable[Constant]) -> None:
        self._all = list(constants)
        self._used = defaultdict[tuple[str, str], list[_Place]](list)
        self._named = defaultdict[str, list[_Place]](list)
        for constant in self._all:
            for use in constant.uses:
                self._used[use.scope, use.role].append((constant, use.flipped))
            for name in constant.names:
                self._named[name].append((constant, False))

    def place(self, name: str, shape: tuple[int, ...]) -> _Place | None:
        """The one constant that the module uses in that role, or that has that name."""
        for candidates in self._candidates(name):
            fitting = {id(c): (c, flipped) for c, flipped in candidates if _fits(c, shape, flipped)}
            if len(fitting) == 1:
                return next(iter(fitting.values()))
        return None

    def _candidates(self, name: str) -> Iterator[list[_Place]]:
        module, _, role = name.rpartition(".")
        for prefix in _PREFIXES:
            yield self._used.get((prefix + module, role), [])
        for prefix in _PREFIXES:
            yield self._named.get(prefix + name, [])

    def only_one_left(self, shape: tuple[int, ...], taken: set[int]) -> _Place | None:
        left = [c for c in self._all if id(c) not in taken and len(shape) > 1 and _fits(c, shape, False)]
        return (left[0], False) if len(left) == 1 else None


def _fits(constant: Constant, shape: tuple[int, ...], flipped: bool) -> bool:
    """Exporters add dimensions of size 1 for broadcasting."""
    return _squeezed(constant.shape) == _squeezed(shape[::-1] if flipped else shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _read(place: _Place, shape: tuple[int, ...]) -> Tensor:
    constant, flipped = place
    tensor = constant.read()
    return (tensor.reshape(shape[::-1]).T if flipped else tensor.reshape(shape)).contiguous()
