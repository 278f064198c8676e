"""Opens one model and ends: `python -m edgeomni.runtimes.openvino.open_graph FILE`, for `edgeomni verify`."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeomni.errors import EdgeOmniError
from edgeomni.runtimes.refusal import told


def main(path: str) -> int:
    """0 when the model opens; else a code of refusal.py, and the reason on stderr. A crash ends the process."""
    try:
        from edgeomni.runtimes.openvino.models import ModelFactory

        ModelFactory(threads=1).open(Path(path))
    except EdgeOmniError as exc:
        return told(exc)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
