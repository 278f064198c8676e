"""How a child process that opened one graph, for `edgeomni verify --load`, tells why it did not open."""

from __future__ import annotations

import sys

from edgeomni.errors import EdgeOmniError, EngineUnavailable

REFUSED = 1
"""Exit code: the graph is at fault, or nobody knows what is."""
NOT_HERE = 4
"""Exit code: this machine lacks what the graph needs, and the graph may be fine. Python itself ends with 1 and 2."""
LACKS = ("package", "device", "target", "version", "memory")
"""Kinds of EngineUnavailable that say nothing against the graph."""


def told(exc: EdgeOmniError) -> int:
    """Prints the message to stderr and returns the exit code."""
    print(exc, file=sys.stderr)
    return NOT_HERE if isinstance(exc, EngineUnavailable) and exc.kind in LACKS else REFUSED
