"""Meters: peak memory of a process, and percentiles of spans."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MB = 1e6


def peak_rss_mb() -> float | None:
    """Most memory that this process ever held, in MB (10^6 bytes); None where the system does not tell.

    Linux: VmHWM, which starts anew with each executed process (getrusage inherits it from the parent).
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _rusage_mb()
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    return _rusage_mb()


def _rusage_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak * 1024 / MB


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """count, total_s, and p50, p95, p99 in ms (linear interpolation)."""
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return {
        "count": len(seconds),
        "total_s": float(sum(seconds)),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
    }
