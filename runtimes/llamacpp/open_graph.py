"""Opens the component of a bundle that a GGUF file belongs to, and ends, for `edgeomni verify`:
`python -m edgeomni.runtimes.llamacpp.open_graph FILE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgeomni.bundle import MANIFEST, Bundle
from edgeomni.components import OpenOptions
from edgeomni.errors import BundleError
from edgeomni.runtimes import llamacpp
from edgeomni.runtimes.common.trial import said_by


def main(path: str) -> int:
    """0 when the component opens; else a code of trial.py, and the reason on stderr. A crash ends the process."""
    return said_by(lambda: _open(Path(path).resolve()))


def _open(path: Path) -> None:
    bundle, name = _component_of(path)
    llamacpp.open_component(bundle, name, OpenOptions(threads=1)).close()


def _component_of(path: Path) -> tuple[Bundle, str]:
    """The bundle that the file lies in, and the component that names it."""
    for root in path.parents:
        if (root / MANIFEST).is_file():
            bundle = Bundle.open(root, hashes=False)
            for component in bundle.exports():
                if any((root / graph.path).resolve() == path for graph in component.graphs.values()):
                    return bundle.with_components({component.name: component}), component.name
    raise BundleError(f"{path}: no bundle around it names it; export the checkpoint again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
