"""What the installed llama.cpp was built for, asked in a process of its own.

A build for another processor ends the process at its first instruction that is missing here, which then says so.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from ..engines import ENGINES
from ..install_hint import build_command

PROBE = """
import json, llama_cpp
print(json.dumps([llama_cpp.llama_print_system_info().decode(), bool(llama_cpp.llama_supports_gpu_offload())]))
"""
TIMEOUT_S = 30.0
_PORTABLE = build_command("llama-cpp-python", "-DGGML_NATIVE=OFF")


def llama_build(probe: str = PROBE) -> dict[str, Any]:
    """`backends`: of each that the build has, the features it was built with; `gpu`: whether it can use one.

    Where it does not run here, `problem` says why and what to do instead. `probe` is the program that is asked.
    """
    command = [sys.executable, "-c", probe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"problem": f"llama.cpp does not answer within {TIMEOUT_S:g} s"}
    if done.returncode == -signal.SIGILL:
        return {"problem": f"llama.cpp was built for another processor; build it for this one: {_PORTABLE}"}
    try:
        told, gpu = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"problem": f"llama.cpp cannot be loaded ({reason[:200]}); {ENGINES['llama.cpp'].install}"}
    return {"backends": backends(told), "gpu": gpu}


def backends(told: str) -> dict[str, list[str]]:
    """llama.cpp's own line ("CPU : AVX2 = 1 | F16C = 1 | CUDA : ARCHS = 900 | ") by backend, switches without "= 1"."""
    found = dict[str, list[str]]()
    name = ""
    for part in (piece.strip() for piece in told.split("|")):
        if " : " in part:
            name, _, part = part.partition(" : ")
        if part:
            found.setdefault(name.strip(), []).append(part.strip().removesuffix(" = 1"))
    return found


def build_line(build: dict[str, Any]) -> str:
    """The same in one line for people."""
    if "problem" in build:
        return str(build["problem"])
    parts = [f"{name} ({', '.join(features)})" for name, features in build["backends"].items()]
    return f"llama.cpp was built with: {'; '.join(parts)}" + ("" if build["gpu"] else "; no GPU")
