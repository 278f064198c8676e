"""Opens the component of a bundle that a GGUF file belongs to, and ends, for `edgeomni verify`:
`python -m edgeomni.runtimes.llamacpp.open_graph FILE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgeomni.bundle import MANIFEST, Bundle
from edgeomni.components import OpenOptions
from edgeomni.errors import BundleError, EdgeOmniError
from edgeomni.runtimes import llamacpp
from edgeomni.runtimes.refusal import told


def main(path: str) -> int:
    """0 when the component opens; else a code of refusal.py, and the reason on stderr. A crash ends the process."""
    try:
        bundle, name = _component_of(Path(path).resolve())
        llamacpp.open_component(bundle, name, OpenOptions(threads=1)).close()
    except EdgeOmniError as exc:
        return told(exc)
    return 0


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
