"""Trying in a process of its own whether an engine opens a file (open_graph.py in the engines' folders).

For `edgeomni verify --load`, which blames the bundle only for what is the bundle's fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from edgeomni.errors import EdgeOmniError, EngineUnavailable

REFUSED = 1
"""Exit code: the graph is at fault, or nobody knows what is."""
NOT_HERE = 4
"""Exit code: this machine lacks what the graph needs, and the graph may be fine. Python itself ends with 1 and 2."""
LACKS = ("package", "device", "target", "version", "memory")
"""Kinds of EngineUnavailable that say nothing against the graph."""


def said_by(opens: Callable[[], None]) -> int:
    """The process's exit code: 0 when `opens` returns; else one of the above, the message on stderr."""
    try:
        opens()
    except EdgeOmniError as exc:
        print(exc, file=sys.stderr)
        return NOT_HERE if isinstance(exc, EngineUnavailable) and exc.kind in LACKS else REFUSED
    return 0
