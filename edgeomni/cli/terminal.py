"""Text that comes from files or from a model, on its way to the terminal: it is shown, and it commands nothing.

A terminal acts on control characters (C0, DEL and C1), and rich acts on markup in square brackets. Neither may come
from a bundle's licences, from a file's name or from an answer.
"""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0, DEL, C1; line and paragraph separators; what turns the direction of writing; halves of characters."""
_CONTROLS_BUT_LINES = re.compile(r"(?![\n\t])" + _CONTROLS.pattern)
_SPOKEN_AWAY = re.compile(r"(?![\n\t])[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def plain(text: Any) -> Text:
    """A table's cell: the text on one line, without control characters, its brackets no markup."""
    return Text(_CONTROLS.sub("", re.sub(r"[\n\t]", " ", str(text))))


def visible(message: str) -> str:
    r"""A message with its control characters written out (\x1b); line breaks and tabs stay."""
    return _CONTROLS_BUT_LINES.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), message)


def answer_text(delta: str) -> str:
    """A piece of a model's answer without control characters; line breaks and tabs stay."""
    return _SPOKEN_AWAY.sub("", delta)
