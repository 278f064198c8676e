"""Opens one graph in a process of its own, so that an engine that aborts takes nothing else with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ..apart import module_command
from ..engines import ENGINES
from ..errors import EngineError
from ..runtimes.common import trial

NOT_HERE = "cannot be opened here"
"""How the sentence begins on a graph that needs what this machine lacks."""
MOST_WORDS = 400
"""Characters of an engine's message that are repeated."""
OPENING_S = 600
"""Longest wait for one graph. The largest graphs so far open in ten seconds."""


def open_apart(engine: str, path: Path, timeout: float = OPENING_S) -> str:
    """Opens the graph at `path` with `engine` in a child process, on the CPU.

    Returns "" when it opened, else one sentence on what happened: the engine's own message, or the signal that ended
    the process. Raises EngineError for an engine that this EdgeOmni does not have.
    """
    if engine not in ENGINES:
        raise EngineError(f"no engine {engine!r} in this EdgeOmni; known are {', '.join(ENGINES)}. Update EdgeOmni")
    module = f"edgeomni.runtimes.{ENGINES[engine].folder}.open_graph"
    try:
        child = subprocess.run(
            module_command(module, os.fspath(path.resolve())),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout,
            check=False,
            env=environment(),
        )
    except subprocess.TimeoutExpired:
        return f"was not open after {timeout:g} s"
    return _outcome(child.returncode, child.stderr.decode("utf-8", errors="replace"))


def _outcome(code: int, said: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"ended its process with {_signal_name(-code)}"
    lines = said.strip().splitlines()
    what = NOT_HERE if code == trial.NOT_HERE and lines else "was refused"
    return f"{what} ({lines[-1][:MOST_WORDS] if lines else f'exit code {code}'})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def environment() -> dict[str, str]:
    """The parent's, with the parent's import path, and without the current directory, which may hold anything."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
