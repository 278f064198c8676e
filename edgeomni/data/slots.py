"""Templates with slots ("what is {a} plus {b}") and the small formulas that fill them ("number[a + b]").

A formula computes with whole numbers: names, + - * // %, comparisons, and, or, not, min(), max(), and a word of a
list by its index, counted from 0. It is read by Python's parser and computed here; nothing else can be run by it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError

Value = int | str
Lists = Mapping[str, Sequence[str]]

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_MOST_CHARACTERS = 200
_SMALL = 1 << 31
"""Numbers stay below this; what a recipe counts is far smaller."""
_OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}


def slots_of(template: str) -> list[str]:
    """The names of a template's slots, in order. Raises DataError for braces that make no slot."""
    rest = _SLOT.sub("", template)
    if "{" in rest or "}" in rest:
        raise DataError(f"{template!r} has a brace that makes no slot; a slot is a name in braces, as in {{a}}")
    return _SLOT.findall(template)


def fill(template: str, words: Mapping[str, str]) -> str:
    """The template with every slot replaced. Raises DataError for a slot without a value."""
    if missing := [name for name in slots_of(template) if name not in words]:
        known = f"known are {', '.join(sorted(words))}" if words else "nothing here has a value"
        raise DataError(f"{template!r} has a slot {{{missing[0]}}} that nothing fills; {known}")
    return _SLOT.sub(lambda match: words[match[1]], template)


@dataclass(frozen=True)
class Formula:
    """A formula that has been parsed; `text` is how it was written."""

    text: str
    tree: ast.expr

    @classmethod
    def parse(cls, text: str) -> Formula:
        """Raises DataError for what is no formula."""
        if len(text) > _MOST_CHARACTERS:
            raise DataError(f"a formula of {len(text)} characters is too long; {_MOST_CHARACTERS} are allowed")
        try:
            return cls(text, ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            raise DataError(f"{text!r} is no formula; write it as in 'number[a + b]' or 'a < b'") from exc

    def value(self, numbers: Mapping[str, int], lists: Lists) -> Value:
        """A number, or a word of a list. Raises DataError for unknown names, an index outside its list, and so on."""
        return _Computation(self.text, numbers, lists).of(self.tree)


@dataclass(frozen=True)
class _Computation:
    text: str
    numbers: Mapping[str, int]
    lists: Lists

    def of(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            return self._word(node.value.id, self._number(node.slice))
        return self._number(node)

    def _word(self, name: str, index: int) -> str:
        if name not in self.lists:
            raise self._fault(f"there is no list {name!r}")
        if not 0 <= index < len(self.lists[name]):
            raise self._fault(f"index {index} is outside the list {name!r}, which has {len(self.lists[name])} words")
        return self.lists[name][index]

    def _number(self, node: ast.expr) -> int:
        result = self._computed(node)
        if abs(result) >= _SMALL:
            raise self._fault("the numbers grow too large")
        return result

    def _computed(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.BinOp):
            return self._applied(node.op, node.left, node.right)
        if isinstance(node, ast.Compare):
            terms = [node.left, *node.comparators]
            pairs = zip(node.ops, terms[:-1], terms[1:], strict=True)
            return int(all(self._applied(op, left, right) for op, left, right in pairs))
        if isinstance(node, ast.BoolOp):
            values = (self._number(value) != 0 for value in node.values)
            return int(all(values) if isinstance(node.op, ast.And) else any(values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            value = self._number(node.operand)
            return -value if isinstance(node.op, ast.USub) else int(not value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            return self._called(node.func.id, node)
        raise self._fault(
            "only numbers, names, + - * // %, comparisons, and, or, not, min, max and list[index] are known"
        )

    def _named(self, name: str) -> int:
        if name not in self.numbers:
            raise self._fault(f"there is no argument {name!r}; known are {', '.join(self.numbers) or 'none'}")
        return self.numbers[name]

    def _applied(self, op: ast.AST, left: ast.expr, right: ast.expr) -> int:
        if type(op) not in _OPERATORS:
            raise self._fault("its only operators are + - * // %, comparisons, and, or, not")
        try:
            return int(_OPERATORS[type(op)](self._number(left), self._number(right)))
        except ZeroDivisionError as exc:
            raise self._fault("it divides by zero") from exc

    def _called(self, name: str, node: ast.Call) -> int:
        if not node.args or node.keywords:
            raise self._fault(f"{name}() takes numbers, as in {name}(a, b)")
        return _FUNCTIONS[name]([self._number(argument) for argument in node.args])

    def _fault(self, what: str) -> DataError:
        given = ", ".join(f"{name} = {value}" for name, value in self.numbers.items())
        return DataError(f"formula {self.text!r}{f' with {given}' if given else ''}: {what}")
