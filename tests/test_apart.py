"""Processes of EdgeOmni's own import nothing from the folder that the user is in, on Python 3.10 as on later ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgeomni.apart import module_command


def test_the_current_folder_is_not_imported_from(tmp_path: Path) -> None:
    """Without PYTHONSAFEPATH, which Python 3.10 does not know."""
    for name in ("json", "runpy", "numpy", "edgeomni"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the current folder')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = module_command("edgeomni.overlap")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_arguments_are_those_of_the_module(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text("import sys; print(__name__, sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = module_command("told", "-m", "two words")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "__main__ ['-m', 'two words']", done.stderr
