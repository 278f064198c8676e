"""Trying in a process of its own whether an engine opens a file; see open_graph.py in the engines' folders."""

from __future__ import annotations

import sys
from collections.abc import Callable

from edgeomni.errors import EdgeOmniError


def said_by(opens: Callable[[], None]) -> int:
    """The process's exit code: 0 when `opens` returns; 1, with its message on stderr, where it raises EdgeOmniError."""
    try:
        opens()
    except EdgeOmniError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0
