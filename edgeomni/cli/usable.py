"""Which engines can compute here, and on what: each asked in a process of its own, all at the same time."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

from ..apart import module_command
from ..engines import Engine
from .opening import environment

TIMEOUT_S = 60.0
"""For one engine to be loaded and asked for every device. On two slow cores the slowest takes five seconds."""
UNTESTED = "untested on {}"
NVIDIA = ("cuda", "tensorrt")
"""Devices that are a GPU of NVIDIA."""


def usable(engines: Iterable[Engine], timeout: float = TIMEOUT_S) -> dict[str, dict[str, str]]:
    """Engine -> device -> why it cannot compute there, "" where it can."""
    started = {engine: _ask(engine.name) for engine in engines}
    return {engine.name: _answer(engine, child, timeout) for engine, child in started.items()}


def _ask(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        module_command("edgeomni.runtimes.probe", name),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def _answer(engine: Engine, child: subprocess.Popen[str], timeout: float) -> dict[str, str]:
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return dict.fromkeys(engine.devices, f"{engine.name} does not answer within {timeout:g} s")
    with contextlib.suppress(ValueError, IndexError):
        told = json.loads(out.splitlines()[-1])
        if child.returncode == 0 and isinstance(told, dict):
            return {device: str(told.get(device, "")) for device in engine.devices}
    return dict.fromkeys(engine.devices, f"{engine.name} cannot be loaded: {_ending(child.returncode, err)}")


def _ending(code: int, said: str) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it ended its process with {signal.Signals(-code).name}"
    return (said.strip().splitlines() or [f"exit code {code}"])[-1][:300]


def here(part: dict[str, Any]) -> str:
    """In a few words what an engine of doctor's report runs on here."""
    if not part["version"]:
        return "not installed"
    if part["devices"] is None:
        return "not asked"
    words = [_device(device, told) for device, told in part["devices"].items()]
    return ", ".join(words)


def _device(device: str, told: dict[str, Any]) -> str:
    state = "no" if told["problem"] else "yes"
    where = "an NPU" if device == "npu" else "a GPU"
    return f"{device}: {state}" + (f" ({UNTESTED.format(where)})" if told["untested"] else "")


def reasons(engines: dict[str, dict[str, Any]], with_gpu: bool) -> Iterator[str]:
    """Why installed engines cannot use a device, one line each, the same words once.

    Without a GPU of NVIDIA (`with_gpu` false) that is the one reason given for all of its devices.
    """
    if not with_gpu and any(d in NVIDIA for part in engines.values() for d in part["devices"] or {}):
        yield f"{' and '.join(NVIDIA)}: this machine shows no GPU of NVIDIA (doctor --json tells what each engine says)"
    for name, part in engines.items():
        said: dict[str, list[str]] = {}
        for device, told in (part["devices"] or {}).items():
            if told["problem"] and (with_gpu or device not in NVIDIA):
                said.setdefault(told["problem"], []).append(device)
        for problem, devices in said.items():
            yield f"{name} on {' and '.join(devices)}: {problem}"
