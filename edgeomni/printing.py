"""Tables on terminals of any width: what does not fit is listed line by line, so that nothing is cut off."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 100_000


def show(out: Console, table: Table) -> None:
    """Prints `table`, or its rows as lines where it is wider than the console.

    Lines are not broken here: the terminal wraps them, and what is copied from it is whole.
    """
    if out.measure(table, options=out.options.update_width(_UNBOUNDED)).maximum <= out.width:
        out.print(table)
        return
    for line in _lines(table):
        say(out, line)


def say(out: Console, text: str = "") -> None:
    """Prints plain text as it is: no markup, no line breaks but its own."""
    out.print(Text(text), soft_wrap=True)


def _lines(table: Table) -> Iterator[str]:
    """The title, then of each row its first cell and the others below it, by their columns' names."""
    if table.title:
        yield f"{table.title}:"
    headers = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        first, *rest = (", ".join(str(cell).splitlines()) for cell in row)
        if not table.show_header:
            yield f"  {first}: {' '.join(rest)}"
            continue
        yield f"  {first}"
        yield from (f"    {name}: {cell}" for name, cell in zip(headers[1:], rest, strict=True) if cell)
