"""Small child processes that use the bottom layer of EdgeOmni and stand still at known points."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import edgeomni

WITHOUT_ENGINES = """
import sys, types
package = types.ModuleType("edgeomni")
package.__path__ = [sys.argv.pop(1)]
sys.modules["edgeomni"] = package

def pause(word):
    print(word, flush=True)
    sys.stdin.readline()
"""
"""Makes the package without running its __init__, which would take a second for what these children do not need."""


class Child:
    """Runs Python code that calls `pause(word)`; each method returns when the child is where it says."""

    def __init__(self, code: str, *arguments: object) -> None:
        here = str(Path(edgeomni.__file__).parent)
        command = [sys.executable, "-c", WITHOUT_ENGINES + code, here, *map(str, arguments)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def expect(self, word: str) -> None:
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert said == word + "\n", (said, self.process.communicate()[1])

    def let_go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[int, str, str]:
        """Its exit code, and what it said since on stdout and stderr."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def end(self, number: int) -> int:
        """Sends a signal that is to end it; returns its exit code."""
        self.process.send_signal(number)
        return self.ended()[0]
