"""Opens one ONNX graph and ends: `python -m edgeomni.runtimes.onnxruntime.open_graph FILE`, for `edgeomni verify`."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeomni.runtimes.common.trial import said_by


def main(path: str) -> int:
    """0 when the graph opens; else a code of trial.py, and the reason on stderr. A crash ends the process."""
    return said_by(lambda: _open(Path(path)))


def _open(path: Path) -> None:
    from edgeomni.runtimes.onnxruntime.sessions import SessionFactory

    SessionFactory(threads=1).open(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
