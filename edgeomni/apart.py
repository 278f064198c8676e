"""Modules of EdgeOmni in processes of their own, which import nothing from the folder that the user is in.

`python -m` puts that folder before everything else. PYTHONSAFEPATH ends that, but only from Python 3.11 on.
"""

from __future__ import annotations

import sys

_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; del sys.argv[0]; import runpy; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` as `python -m` would, but for the current folder."""
    return [sys.executable, "-c", _START, module, *arguments]
