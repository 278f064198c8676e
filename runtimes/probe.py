"""Says on which devices an engine can compute here: `python -m edgeomni.runtimes.probe ENGINE`, for `edgeomni doctor`.

A library that was built for another processor or another driver may end the process that loads it, so that it is asked
in one of its own.
"""

from __future__ import annotations

import json
import sys

from edgeomni.engines import ENGINES
from edgeomni.runtimes import problem


def main(name: str) -> None:
    """Prints one JSON line: device -> why the engine cannot compute there, "" where it can."""
    engine = ENGINES[name]
    print(json.dumps({device: problem(engine, device) for device in engine.devices}))


if __name__ == "__main__":
    main(sys.argv[1])
